// Package agent is the node agent: it knows which pods exist, holds their
// network namespaces open, and tells ztunnels about them over ZDS.
//
// A ztunnel that connects gets a snapshot of all pods, then updates: a new pod
// goes to the newest ztunnel, a deleted one to all of them. Verbs reach the
// agent over a second socket, with a wire of our own (package control).
//
// One lock, Agent.mu, guards the pods and the queues of the ztunnels, so that
// what goes to a ztunnel goes in the order in which it became true. Nobody sends
// or waits with the lock held.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/cni-emulator/internal/redirect"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/uds"
	"ambient-emulator/internal/zds"
)

// Config is what a person decides.
type Config struct {
	ZDS     string    // where ztunnels connect
	Control string    // where verbs connect
	State   string    // file that remembers the pods across the agent's death; "": none
	Watch   string    // directory whose namespaces are pods; "": none
	Match   string    // glob of their names; "": all but a container runtime's
	Trace   io.Writer // gets a line for each ZDS packet; nil: nobody
	Log     *slog.Logger
	Capture redirect.Config // of pods of which nothing else is said
}

// Agent is a node agent. New makes it, Run runs it.
type Agent struct {
	cfg        Config
	log        *slog.Logger
	since      time.Time
	home, host netns.ID // never pods
	timeout    time.Duration

	zdsUDS, controlUDS *uds.Listener

	keeper  *keeper
	watcher *watcher // or nil
	rules   turns
	parting sync.WaitGroup // of those who take rules out
	blind   bool           // cookies can't be read; see cookie

	mu         sync.Mutex
	pods       map[string]*pod // by uid
	byNetNS    map[netns.ID]*pod
	arriving   map[*handle]control.PodID // pods not yet, whose rules may be in already
	leaving    map[*handle]control.PodID // pods no more, whose rules are not out yet
	generation uint64                    // counts the changes of pods
	ztunnels   []*ztunnel                // in the order in which they said hello: the last is the newest
	count      int                       // connections so far
}

// New opens the two sockets and brings back the pods of the agent before. Nobody
// is served before Run; whoever connects earlier waits in the backlog.
func New(cfg Config) (*Agent, error) {
	home, err := netns.Home()
	if err != nil {
		return nil, err
	}
	a := &Agent{
		cfg:      cfg,
		log:      cfg.Log,
		since:    time.Now(),
		home:     home.ID(),
		timeout:  Timeout,
		pods:     make(map[string]*pod),
		byNetNS:  make(map[netns.ID]*pod),
		arriving: make(map[*handle]control.PodID),
		leaving:  make(map[*handle]control.PodID),
		keeper:   newKeeper(cfg.State),
	}
	// An ordinary user may not look at pid 1, and can't hand over its namespace
	// either.
	if host, err := netns.Open("/proc/1/ns/net"); err == nil {
		a.host = host.ID()
		host.Close()
	}
	if c := cfg.Capture; c.Mode != "" && c.Mode != redirect.None {
		if err := redirect.Able(); err != nil {
			return nil, fmt.Errorf("capture pods: %w", err)
		}
	}
	// The verbs' socket first: it is what tells that another agent runs.
	if a.controlUDS, err = uds.Listen(control.Network, cfg.Control); err != nil {
		return nil, fmt.Errorf("the socket for verbs: %w", err)
	}
	if a.zdsUDS, err = uds.Listen(zds.Network, cfg.ZDS); err != nil {
		return nil, errors.Join(fmt.Errorf("the socket for ztunnels: %w", err), a.controlUDS.Close())
	}
	// All pods must be known before the first snapshot: ztunnel gives up what it
	// lacks.
	err = a.restore()
	if err == nil {
		err = a.save() // tells now, not at the first verb, if it can't be
	}
	if err == nil && cfg.Watch != "" {
		a.watcher, err = newWatcher(a, cfg.Watch, cfg.Match)
	}
	if err != nil {
		return nil, errors.Join(err, a.close())
	}
	return a, nil
}

// close gives back what New has opened. Nobody is at work any more.
func (a *Agent) close() error {
	err := errors.Join(a.zdsUDS.Close(), a.controlUDS.Close())
	if a.watcher != nil {
		err = errors.Join(err, a.watcher.close())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.pods {
		a.unbind(p, ErrStopping)
	}
	return err
}

// Run serves until ctx ends, and gives back everything that New and Run have
// opened. The pods' ztunnels go on without us.
func (a *Agent) Run(ctx context.Context) error {
	a.log.Info("listening for ztunnels", "socket", a.cfg.ZDS, "pid", os.Getpid())
	a.log.Info("listening for verbs", "socket", a.cfg.Control)

	var keeping, wg sync.WaitGroup
	stop := make(chan struct{})
	keeping.Go(func() { a.keep(stop) })
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	part := func(run func(context.Context) error) {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				cancel(err) // one can't go on without the others
			}
		})
	}
	part(a.serveZtunnels)
	part(a.serveVerbs)
	if a.watcher != nil {
		part(a.watcher.run)
	}
	wg.Wait()
	a.parting.Wait() // every ztunnel has answered, or its connection has ended
	close(stop)
	keeping.Wait()
	a.log.Info("stopped", "pods", len(a.pods))
	err := a.close()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		err = errors.Join(cause, err)
	}
	return err
}

func (a *Agent) serveZtunnels(ctx context.Context) error {
	return a.serve(ctx, a.zdsUDS, server{name: "ztunnels", places: MaxZtunnels, burst: acceptBurst, handle: a.serveZtunnel})
}

func (a *Agent) serveVerbs(ctx context.Context) error {
	return a.serve(ctx, a.controlUDS, server{name: "verbs", places: MaxVerbs, handle: a.serveVerb})
}
