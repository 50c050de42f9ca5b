// Package inpod is what ztunnel does inside pods: it keeps, for each network
// namespace handed over, listeners that live there while the process stays on
// the node.
//
// Pods is the set of them in the seed's mode, where Server feeds it. Workloads is
// the set in ZDS mode, where Manager does.
package inpod

import (
	"errors"
	"log/slog"
	"sync"

	"ambient-emulator/internal/netns"
	"ambient-emulator/ztunnel-emulator/internal/accesslog"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// ErrStopping is told to who comes too late.
var ErrStopping = errors.New("ztunnel is shutting down")

// Pods is the set of pods that are served. Its methods may be called at once.
type Pods struct {
	engine *engine

	mu     sync.Mutex
	closed bool
	pods   map[netns.ID]*starting
}

// starting is a pod, or will be one when ready is closed. If err is set then, it
// has not become one.
type starting struct {
	pod   *pod
	ready chan struct{}
	err   error
}

// broken tells whether the pod has started once and lost a listener since.
func (s *starting) broken() bool {
	select {
	case <-s.ready:
		return s.err == nil && s.pod.broken.Load()
	default:
		return false
	}
}

// NewPods returns an empty set. Close it to take all listeners out of all pods.
func NewPods(log *slog.Logger) (*Pods, error) {
	config := &proxy.Config{Mark: DefaultMark, KeepAlive: proxy.DefaultKeepAlive(), Log: log.With(accesslog.Target, accesslog.Access)}
	e, err := newEngine(Addrs(), listenTCP, config, log)
	if err != nil {
		return nil, err
	}
	e.nameOf = nameOf
	e.unredirected = e.answerer.answer
	return &Pods{engine: e, pods: make(map[netns.ID]*starting)}, nil
}

// Len returns how many pods are served.
func (p *Pods) Len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.pods)
}

// Add makes ns a pod: listeners at every address in it, or an error and none.
// It takes ns over. A pod that is there already is a success that changes
// nothing; of several calls for one namespace at once, the others wait for the
// first and share its outcome.
func (p *Pods) Add(ns *netns.NS) (Added, error) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		p.engine.letGo(ns)
		return Added{}, ErrStopping
	}
	there := p.pods[ns.ID()]
	if there != nil && !there.broken() {
		p.mu.Unlock()
		// Ours is one more descriptor of a namespace that there keeps open.
		p.engine.letGo(ns)
		<-there.ready
		return Added{Addrs: p.engine.addrs}, there.err
	}
	self := &starting{ready: make(chan struct{})}
	p.pods[ns.ID()] = self
	p.mu.Unlock()
	if there != nil {
		if err := p.engine.stop(there.pod); err != nil {
			p.engine.log.Error("end a broken pod", "netns", ns.ID(), "error", err)
		}
	}

	var added Added
	self.pod, added, self.err = p.engine.start(ns, proxy.Identity{})
	if self.err != nil {
		p.mu.Lock()
		delete(p.pods, ns.ID())
		p.mu.Unlock()
		p.engine.letGo(ns)
	}
	close(self.ready)
	return added, self.err
}

// Close takes the listeners out of every pod, ends their connections and lets
// the namespaces go. Calls of Add that run are waited for.
func (p *Pods) Close() error {
	p.mu.Lock()
	p.closed = true
	pods := p.pods
	p.pods = nil
	p.mu.Unlock()

	var errs []error
	for _, it := range pods {
		<-it.ready
		if it.err == nil {
			errs = append(errs, p.engine.stop(it.pod))
		}
	}
	errs = append(errs, p.engine.close())
	return errors.Join(errs...)
}
