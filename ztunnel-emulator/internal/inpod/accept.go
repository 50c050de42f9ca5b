package inpod

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// acceptor accepts for every listener of every pod, and receives for every socket
// that takes datagrams, with one epoll(7) instance and one goroutine. A goroutine
// a listener would be more usual, and cost a pod a stack for each while nothing
// happens.
type acceptor struct {
	handle func(owner *pod, port uint16, fd int) // owns fd; must not block
	// packet is handed a datagram, which it may keep, and the socket it came by,
	// which it may use only while it knows the pod to live. It must not block.
	packet func(owner *pod, fd int, datagram []byte, from unix.Sockaddr)
	log    *slog.Logger

	epoll *os.File // itself watched by the Go runtime's poller
	done  chan struct{}

	mu      sync.Mutex // held across accept and remove: a closed number may come back as another socket
	sources map[int]source

	buf [maxDatagram]byte // run's
}

// source is a socket that connections or datagrams come from.
type source struct {
	owner *pod
	socket
}

// maxDatagram is the largest that UDP can carry.
const maxDatagram = 1 << 16

func newAcceptor(handle func(owner *pod, port uint16, fd int), packet func(*pod, int, []byte, unix.Sockaddr), log *slog.Logger) (*acceptor, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	// Non-blocking, so that os.NewFile hands it to the runtime's poller and a
	// wait costs no thread.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	a := &acceptor{
		handle:  handle,
		packet:  packet,
		log:     log,
		epoll:   os.NewFile(uintptr(fd), "epoll"),
		done:    make(chan struct{}),
		sources: make(map[int]source),
	}
	go a.run()
	return a, nil
}

// add starts accepting from sockets, all or none. The acceptor may use them until
// remove.
func (a *acceptor) add(owner *pod, sockets []socket) error {
	raw, err := a.epoll.SyscallConn()
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var ctlErr error
	err = raw.Control(func(epfd uintptr) {
		for i, s := range sockets {
			ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(s.fd)}
			if ctlErr = unix.EpollCtl(int(epfd), unix.EPOLL_CTL_ADD, s.fd, &ev); ctlErr != nil {
				for _, undo := range sockets[:i] {
					unix.EpollCtl(int(epfd), unix.EPOLL_CTL_DEL, undo.fd, nil)
				}
				return
			}
		}
	})
	if err == nil && ctlErr != nil {
		err = os.NewSyscallError("epoll_ctl", ctlErr)
	}
	if err != nil {
		return err
	}
	for _, s := range sockets {
		a.sources[s.fd] = source{owner, s}
	}
	return nil
}

// remove ends the accepting from sockets; the caller may do with them as it likes.
func (a *acceptor) remove(sockets []socket) {
	raw, err := a.epoll.SyscallConn()
	if err != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	raw.Control(func(epfd uintptr) {
		for _, s := range sockets {
			unix.EpollCtl(int(epfd), unix.EPOLL_CTL_DEL, s.fd, nil)
		}
	})
	for _, s := range sockets {
		delete(a.sources, s.fd)
	}
}

// close ends the goroutine. Listeners that are left are not closed.
func (a *acceptor) close() error {
	err := a.epoll.Close()
	<-a.done
	return err
}

// run is the accept loop of all pods.
func (a *acceptor) run() {
	defer close(a.done)
	raw, err := a.epoll.SyscallConn()
	if err != nil {
		return
	}
	events := make([]unix.EpollEvent, 128)
	pause := pauser{least: 5 * time.Millisecond, most: time.Second}
	for {
		var n int
		var waitErr error
		err := raw.Read(func(epfd uintptr) bool {
			// The runtime tells of the next event, not of those that are there
			// already: only an empty answer may wait for it.
			n, waitErr = unix.EpollWait(int(epfd), events, 0)
			return n != 0 || waitErr != nil
		})
		if err != nil {
			return // closed
		}
		if errors.Is(waitErr, unix.EINTR) {
			continue
		}
		if waitErr != nil {
			a.log.Error("no connection to any pod can be accepted any more", "error", os.NewSyscallError("epoll_wait", waitErr))
			return
		}
		full := error(nil)
		for _, ev := range events[:n] {
			if err := a.take(int(ev.Fd)); err != nil {
				full = err
			}
		}
		if full == nil {
			pause.reset()
			continue
		}
		// Out of descriptors or memory. epoll would report the same listeners
		// again at once; their connections can wait in the backlog.
		a.log.Warn("accept", "error", full, "pause", pause.next())
		pause.wait()
	}
}

// fair is how many connections one listener may take before the others' turn.
const fair = 64

// take takes what waits at one socket. It returns an error only when the process
// has run out of something.
func (a *acceptor) take(from int) error {
	for range fair {
		a.mu.Lock()
		s, ok := a.sources[from]
		if !ok {
			a.mu.Unlock()
			return nil // removed since the event
		}
		if s.packets {
			n, peer, err := unix.Recvfrom(from, a.buf[:], 0)
			a.mu.Unlock()
			if errors.Is(err, unix.EAGAIN) {
				return nil
			}
			// Other errors are of datagrams that we have sent (udp(7)).
			if err == nil {
				a.packet(s.owner, from, bytes.Clone(a.buf[:n]), peer)
			}
			continue
		}
		fd, _, err := unix.Accept4(from, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		a.mu.Unlock()
		switch {
		case err == nil:
			a.handle(s.owner, s.port, fd)
		case errors.Is(err, unix.EAGAIN):
			return nil
		case exhausted(err):
			return os.NewSyscallError("accept4", err)
		case ofOneConnection(err):
			// It is gone; the next one is as good as ever.
		default:
			// Somebody in the pod has destroyed the listener (ss -K does that),
			// and it would say so for ever. The pod is broken until it is handed
			// over again.
			s.owner.broken.Store(true)
			a.remove([]socket{s.socket})
			a.log.Error("a listener is gone, the pod needs another handoff", "netns", s.owner.ns.ID(), "port", s.port, "error", os.NewSyscallError("accept4", err))
			return nil
		}
	}
	return nil
}

// ofOneConnection tells the errors of accept(2) that a connection has left behind
// on its way to us.
func ofOneConnection(err error) bool {
	for _, e := range []unix.Errno{
		unix.ECONNABORTED, unix.EINTR, unix.EPROTO, unix.EPERM, unix.ENOPROTOOPT, unix.ENETDOWN,
		unix.ENETUNREACH, unix.EHOSTDOWN, unix.EHOSTUNREACH, unix.ENONET, unix.EOPNOTSUPP, unix.ETIMEDOUT,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// exhausted tells errors of accept(2) that come back until something is freed.
func exhausted(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) ||
		errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM)
}

// pauser is a back-off that doubles.
type pauser struct{ least, most, cur time.Duration }

func (p *pauser) reset() { p.cur = 0 }

// next returns the pause that wait will make.
func (p *pauser) next() time.Duration { return min(max(p.cur*2, p.least), p.most) }

// advance makes the next pause the current one, and returns it.
func (p *pauser) advance() time.Duration {
	p.cur = p.next()
	return p.cur
}

func (p *pauser) wait() { time.Sleep(p.advance()) }
