package inpod

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// ErrOwnNetNS says that a pod claims to live where ztunnel does.
var ErrOwnNetNS = errors.New("this is ztunnel's own network namespace; a pod has one of its own")

// engine starts and stops pods, and serves the connections of all of them. What
// pods there are is not its concern.
type engine struct {
	home    netns.ID
	addrs   []netip.AddrPort
	open    socketFactory
	openDNS dnsFactory // nil: no DNS
	proxy   *proxy.Config
	// unredirected says what becomes of a connection to 15001 or 15006 that nobody
	// has redirected: it is answered, or (nil) refused as a loop.
	unredirected func(owner *pod, fd int)
	// nameOf finds the pod's name, for advice. To look takes long where there are
	// many; with ZDS the pod has a name of another kind, and nobody looks.
	nameOf func(netns.ID) string
	log    *slog.Logger

	answerer *answerer
	acceptor *acceptor
}

// pod is one namespace with its sockets. It owns their descriptors: four in all
// in the seed's mode, eight with DNS.
type pod struct {
	ns      *netns.NS
	visit   visit // to ns
	sockets []socket
	proxy   *proxy.Pod
	broken  atomic.Bool // a listener has died; the next add makes the pod anew

	// life is held, for reading, by who uses a descriptor of the pod's that may be
	// closed meanwhile; and for writing by who ends the pod.
	life    sync.RWMutex
	stopped atomic.Bool // no connection of it may outlive it
}

// visit runs a function on a thread that is in a pod's namespace.
type visit func(fn func() error) (netns.Visit, error)

// errStopped is for who comes when a pod has ended.
var errStopped = errors.New("the pod has ended")

// enter runs fn on a thread inside the pod, while that lives.
func (p *pod) enter(fn func() error) error {
	p.life.RLock()
	defer p.life.RUnlock()
	if p.stopped.Load() {
		return errStopped
	}
	_, err := p.visit(fn)
	return err
}

// reply sends a datagram from the pod's socket fd, while the pod has it: a pod that
// drains has closed its sockets, and the number may be another one's by now.
func (p *pod) reply(fd int, datagram []byte, to unix.Sockaddr) {
	p.life.RLock()
	defer p.life.RUnlock()
	if !p.stopped.Load() && slices.ContainsFunc(p.sockets, func(s socket) bool { return s.fd == fd }) {
		unix.Sendto(fd, datagram, 0, to) // who asked will ask again
	}
}

// Added is what a start did, for the log and for a learner.
type Added struct {
	New      bool // false: the pod was served before, and nothing has changed
	Addrs    []netip.AddrPort
	FDs      []int // the listeners' numbers in this process, in the order of Addrs
	Visit    netns.Visit
	Watch    time.Duration // from the return home to accepting
	LoopDown bool          // lo is down in the pod: nothing will connect yet
	NoLoop6  bool          // the pod has no ::1 (yet): its DNS over IPv6 is not served (yet)
	NetNSFD  int           // the namespace's number in this process
}

// newEngine returns an engine that gives each pod listeners at addrs, made by open,
// and serves what comes by the proxy's configuration.
func newEngine(addrs []netip.AddrPort, open socketFactory, config *proxy.Config, log *slog.Logger) (*engine, error) {
	home, err := netns.Home()
	if err != nil {
		return nil, err
	}
	e := &engine{home: home.ID(), addrs: addrs, open: open, proxy: config, nameOf: func(netns.ID) string { return "" }, log: log, answerer: newAnswerer()}
	e.acceptor, err = newAcceptor(e.accepted, received, log)
	if err != nil {
		return nil, err
	}
	growTable(home.FD())
	return e, nil
}

// accepted serves a connection to one of a pod's ports.
func (e *engine) accepted(owner *pod, port uint16, fd int) {
	if port == PortInbound && e.proxy.Mesh == nil {
		e.answerer.answer(owner, fd) // no tunnel without identities
		return
	}
	owner.proxy.Serve(port, fd)
}

// received serves a datagram, which can only be a DNS query. One that claims to
// come from where we answer would be answered to ourselves, for ever.
func received(owner *pod, fd int, query []byte, from unix.Sockaddr) {
	src := proxy.AddrPort(from)
	if src.Port() == proxy.PortDNS {
		return
	}
	owner.proxy.DNS(query, src, func(answer []byte) { owner.reply(fd, answer, from) })
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
func (e *engine) start(ns *netns.NS, id proxy.Identity) (*pod, Added, error) {
	if ns.ID() == e.home {
		return nil, Added{}, ErrOwnNetNS
	}
	return e.startIn(ns, id, ns.Do)
}

// startIn is start of any namespace, given how to get there.
func (e *engine) startIn(ns *netns.NS, id proxy.Identity, visit visit) (*pod, Added, error) {
	added := Added{New: true, Addrs: e.addrs, NetNSFD: ns.FD()}
	made, err := listen(visit, e.addrs, e.open, e.openDNS)
	added.Visit, added.NoLoop6 = made.visit, made.noLoopback6
	if err != nil {
		return nil, added, fmt.Errorf("%w%s", err, e.advice(err, ns.ID()))
	}
	began := time.Now()
	sockets := made.sockets
	if up, err := loopbackUp(sockets[0].fd); err == nil {
		added.LoopDown = !up
	}
	p := &pod{ns: ns, visit: visit, sockets: sockets}
	var unredirected func(fd int)
	if e.unredirected != nil {
		unredirected = func(fd int) { e.unredirected(p, fd) }
	}
	p.proxy = e.proxy.NewPod(id, p.enter, unredirected)
	if err := e.acceptor.add(p, sockets); err != nil {
		p.proxy.Close()
		closeAll(sockets)
		return nil, added, err
	}
	for _, s := range sockets[len(sockets)-len(e.addrs):] {
		added.FDs = append(added.FDs, s.fd)
	}
	added.Watch = time.Since(began)
	return p, added, nil
}

// stop ends a pod at once: listeners, connections, namespace. Nothing of ours
// keeps the kernel from freeing the namespace then.
func (e *engine) stop(p *pod) error {
	e.acceptor.remove(p.sockets)
	p.proxy.Close()
	p.stopped.Store(true)
	e.answerer.cut(p)
	p.life.Lock()
	defer p.life.Unlock()
	return errors.Join(closeAll(p.sockets), p.ns.Close())
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
