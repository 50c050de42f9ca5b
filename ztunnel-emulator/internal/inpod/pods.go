// Package inpod is what ztunnel does inside pods: it keeps, for each network
// namespace handed over, listeners that live there while the process stays on
// the node.
//
// Pods is the set of them. Server feeds it from the seed's wire.
package inpod

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// Why a pod is not served.
var (
	ErrOwnNetNS = errors.New("this is ztunnel's own network namespace; a pod has one of its own")
	ErrStopping = errors.New("ztunnel is shutting down")
)

// Pods is the set of pods that are served. Its methods may be called at once.
type Pods struct {
	home  netns.ID
	addrs []netip.AddrPort
	open  socketFactory
	log   *slog.Logger

	answerer *answerer
	acceptor *acceptor

	mu     sync.Mutex
	closed bool
	pods   map[netns.ID]*pod
}

// pod is one namespace with its listeners. It owns its four descriptors.
type pod struct {
	ns        *netns.NS
	listeners []int

	// ready is closed when the start has ended; err is set before that.
	ready chan struct{}
	err   error
}

// Added is what Add did, for the log and for a learner.
type Added struct {
	New      bool // false: the pod was served before, and nothing has changed
	Addrs    []netip.AddrPort
	FDs      []int // the listeners' numbers in this process, in the order of Addrs
	Visit    netns.Visit
	Watch    time.Duration // from the return home to accepting
	LoopDown bool          // lo is down in the pod: nothing will connect yet
}

// NewPods returns an empty set. Close it to take all listeners out of all pods.
func NewPods(log *slog.Logger) (*Pods, error) {
	home, err := netns.Home()
	if err != nil {
		return nil, err
	}
	p := &Pods{
		home:     home.ID(),
		addrs:    Addrs(),
		open:     listenTCP,
		log:      log,
		answerer: newAnswerer(),
		pods:     make(map[netns.ID]*pod),
	}
	p.acceptor, err = newAcceptor(p.answerer.answer, log)
	if err != nil {
		return nil, err
	}
	growTable(home.FD())
	return p, nil
}

// roomFor is how many descriptors the table is made for at the start: four a pod
// and some thousands of pods.
const roomFor = 1 << 14

// growTable grows the descriptor table once. Whenever it grows in a process of
// many threads the kernel waits for an RCU grace period, about 10 ms, and it
// would do so at each doubling, in the middle of a handoff.
func growTable(anyFD int) {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return
	}
	// The table is made large enough for the number asked for, and never shrinks.
	highest := min(roomFor, limit.Cur) - 1
	if fd, err := unix.FcntlInt(uintptr(anyFD), unix.F_DUPFD_CLOEXEC, int(highest)); err == nil {
		unix.Close(fd)
	}
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
	if ns.ID() == p.home {
		ns.Close()
		return Added{}, ErrOwnNetNS
	}

	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		ns.Close()
		return Added{}, ErrStopping
	}
	if there, ok := p.pods[ns.ID()]; ok {
		p.mu.Unlock()
		// Ours is one more descriptor of a namespace that there keeps open.
		ns.Close()
		<-there.ready
		return Added{Addrs: p.addrs}, there.err
	}
	self := &pod{ns: ns, ready: make(chan struct{})}
	p.pods[ns.ID()] = self
	p.mu.Unlock()

	added, err := p.start(self)
	self.err = err
	close(self.ready)
	if err != nil {
		p.mu.Lock()
		delete(p.pods, ns.ID())
		p.mu.Unlock()
		ns.Close()
	}
	return added, err
}

// start gives a pod its listeners.
func (p *Pods) start(self *pod) (Added, error) {
	added := Added{New: true, Addrs: p.addrs}
	fds, visit, err := listen(self.ns, p.addrs, p.open)
	added.Visit = visit
	if err != nil {
		return added, fmt.Errorf("%w%s", err, advice(err, self.ns.ID()))
	}
	began := time.Now()
	if up, err := loopbackUp(fds[0]); err == nil {
		added.LoopDown = !up
	}
	if err := p.acceptor.add(fds); err != nil {
		closeAll(fds)
		return added, err
	}
	self.listeners = fds
	added.FDs, added.Watch = fds, time.Since(began)
	return added, nil
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
		if it.err != nil {
			continue // closed by Add
		}
		errs = append(errs, p.acceptor.remove(it.listeners), it.ns.Close())
	}
	errs = append(errs, p.acceptor.close())
	p.answerer.close()
	return errors.Join(errs...)
}

// advice says what a person may try when a pod's start has failed.
func advice(err error, id netns.ID) string {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return "; nothing was bound: see who has it with " + podCommand(id, "ss -ntlp", "ip netns exec %s ss -ntlp")
	case errors.Is(err, unix.EMFILE):
		return "; nothing was bound: this ztunnel has too many open files, raise its limit (ulimit -n, LimitNOFILE=)"
	case errors.Is(err, unix.EPERM):
		return "; ztunnel needs CAP_SYS_ADMIN in the user namespace that owns the pod's network namespace"
	}
	return ""
}

// LoopDownWarning words what to do about a pod whose lo is down. It looks for the
// pod's name, which takes long where there are many; not before the reply.
func LoopDownWarning(id netns.ID) string {
	return "lo is down in the pod: nothing will connect until " + podCommand(id, "ip link set lo up", "ip -n %s link set lo up")
}

// podCommand words a command to run in the pod: with its name if `ip netns`
// knows one, else plainly.
func podCommand(id netns.ID, plain, named string) string {
	if name := nameOf(id); name != "" {
		return fmt.Sprintf(named, name)
	}
	return plain + " (run in the pod)"
}

// nameOf returns the name under which ip-netns(8) keeps a namespace, or "".
func nameOf(id netns.ID) string {
	paths, _ := filepath.Glob("/var/run/netns/*")
	for _, path := range paths {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil && st.Dev == id.Dev && st.Ino == id.Ino {
			return filepath.Base(path)
		}
	}
	return ""
}
