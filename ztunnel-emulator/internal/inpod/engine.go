package inpod

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// ErrOwnNetNS says that a pod claims to live where ztunnel does.
var ErrOwnNetNS = errors.New("this is ztunnel's own network namespace; a pod has one of its own")

// engine starts and stops pods, and serves the connections of all of them. What
// pods there are is not its concern.
type engine struct {
	home  netns.ID
	addrs []netip.AddrPort
	open  socketFactory
	// nameOf finds the pod's name, for advice. To look takes long where there are
	// many; with ZDS the pod has a name of another kind, and nobody looks.
	nameOf func(netns.ID) string
	log    *slog.Logger

	answerer *answerer
	acceptor *acceptor
}

// pod is one namespace with its listeners. It owns their descriptors, four in
// all.
type pod struct {
	ns        *netns.NS
	listeners []int
	broken    atomic.Bool // a listener has died; the next add makes the pod anew
	stopped   atomic.Bool // no connection of it may outlive it
}

// Added is what a start did, for the log and for a learner.
type Added struct {
	New      bool // false: the pod was served before, and nothing has changed
	Addrs    []netip.AddrPort
	FDs      []int // the listeners' numbers in this process, in the order of Addrs
	Visit    netns.Visit
	Watch    time.Duration // from the return home to accepting
	LoopDown bool          // lo is down in the pod: nothing will connect yet
	NetNSFD  int           // the namespace's number in this process
}

// newEngine returns an engine that gives each pod listeners at addrs, made by open.
func newEngine(addrs []netip.AddrPort, open socketFactory, log *slog.Logger) (*engine, error) {
	home, err := netns.Home()
	if err != nil {
		return nil, err
	}
	e := &engine{home: home.ID(), addrs: addrs, open: open, nameOf: func(netns.ID) string { return "" }, log: log, answerer: newAnswerer()}
	e.acceptor, err = newAcceptor(e.answerer.answer, log)
	if err != nil {
		return nil, err
	}
	growTable(home.FD())
	return e, nil
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

// start makes ns a pod: listeners at every address in it, or an error and none.
// The pod owns ns; after an error it is still the caller's.
func (e *engine) start(ns *netns.NS) (*pod, Added, error) {
	added := Added{New: true, Addrs: e.addrs, NetNSFD: ns.FD()}
	if ns.ID() == e.home {
		return nil, added, ErrOwnNetNS
	}
	fds, visit, err := listen(ns, e.addrs, e.open)
	added.Visit = visit
	if err != nil {
		return nil, added, fmt.Errorf("%w%s", err, e.advice(err, ns.ID()))
	}
	began := time.Now()
	if up, err := loopbackUp(fds[0]); err == nil {
		added.LoopDown = !up
	}
	p := &pod{ns: ns, listeners: fds}
	if err := e.acceptor.add(p, fds); err != nil {
		closeAll(fds)
		return nil, added, err
	}
	added.FDs, added.Watch = fds, time.Since(began)
	return p, added, nil
}

// stop ends a pod at once: listeners, connections, namespace. Nothing of ours
// keeps the kernel from freeing the namespace then.
func (e *engine) stop(p *pod) error {
	e.acceptor.remove(p.listeners)
	p.stopped.Store(true)
	e.answerer.cut(p)
	return errors.Join(closeAll(p.listeners), p.ns.Close())
}

// letGo closes a namespace that is no pod, or no longer one. Nobody can be told
// if that fails, but it must not go unsaid: the kernel could not free it.
func (e *engine) letGo(ns *netns.NS) {
	id := ns.ID()
	if err := ns.Close(); err != nil {
		e.log.Error("let a namespace go", "netns", id, "error", err)
	}
}

// close ends the serving. The pods have been stopped before.
func (e *engine) close() error {
	err := e.acceptor.close()
	e.answerer.close()
	return err
}

// advice says what a person may try when a pod's start has failed.
func (e *engine) advice(err error, id netns.ID) string {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		if name := e.nameOf(id); name != "" {
			return "; nothing was bound: see who has it with ip netns exec " + name + " ss -ntlp"
		}
		return "; nothing was bound: see who has it with ss -ntlp in the pod"
	case errors.Is(err, unix.EMFILE):
		return "; nothing was bound: raise ztunnel's limit (ulimit -n, LimitNOFILE=)"
	case errors.Is(err, unix.EPERM):
		return "; it takes CAP_SYS_ADMIN in the user namespace that owns the pod's network namespace"
	}
	return ""
}

// LoopDownWarning words what to do about a pod whose lo is down. It looks for the
// pod's name, which takes long where there are many; not before the reply.
func LoopDownWarning(id netns.ID, fd int) string {
	if name := nameOf(id); name != "" {
		return loopDownUntil + "ip -n " + name + " link set lo up"
	}
	return loopDown(fd)
}

const loopDownUntil = "lo is down in the pod: nothing will connect until "

// loopDown is the warning for a pod without a name: it has a descriptor of ours.
func loopDown(fd int) string {
	return fmt.Sprintf("%snsenter --net=/proc/%d/fd/%d ip link set lo up", loopDownUntil, os.Getpid(), fd)
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
