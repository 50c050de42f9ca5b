package inpod

import (
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// acceptor accepts for every listener of every pod with one epoll(7) instance
// and one goroutine. A goroutine a listener would be more usual, and cost a pod
// three stacks while nothing happens.
type acceptor struct {
	handle func(owner *pod, fd int) // owns fd; must not block
	log    *slog.Logger

	epoll *os.File // itself watched by the Go runtime's poller
	done  chan struct{}

	mu        sync.Mutex // held across accept and remove: a closed number may come back as another socket
	listeners map[int]*pod
}

func newAcceptor(handle func(owner *pod, fd int), log *slog.Logger) (*acceptor, error) {
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
		handle:    handle,
		log:       log,
		epoll:     os.NewFile(uintptr(fd), "epoll"),
		done:      make(chan struct{}),
		listeners: make(map[int]*pod),
	}
	go a.run()
	return a, nil
}

// add starts accepting from fds, all or none. The acceptor may use them until
// remove.
func (a *acceptor) add(owner *pod, fds []int) error {
	raw, err := a.epoll.SyscallConn()
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var ctlErr error
	err = raw.Control(func(epfd uintptr) {
		for i, fd := range fds {
			ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
			if ctlErr = unix.EpollCtl(int(epfd), unix.EPOLL_CTL_ADD, fd, &ev); ctlErr != nil {
				for _, undo := range fds[:i] {
					unix.EpollCtl(int(epfd), unix.EPOLL_CTL_DEL, undo, nil)
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
	for _, fd := range fds {
		a.listeners[fd] = owner
	}
	return nil
}

// remove ends the accepting from fds; the caller may do with them as it likes.
func (a *acceptor) remove(fds []int) {
	raw, err := a.epoll.SyscallConn()
	if err != nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	raw.Control(func(epfd uintptr) {
		for _, fd := range fds {
			unix.EpollCtl(int(epfd), unix.EPOLL_CTL_DEL, fd, nil)
		}
	})
	for _, fd := range fds {
		delete(a.listeners, fd)
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
			if err := a.accept(int(ev.Fd)); err != nil {
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

// accept takes what waits at one listener. It returns an error only when the
// process has run out of something.
func (a *acceptor) accept(listener int) error {
	for range fair {
		a.mu.Lock()
		owner := a.listeners[listener]
		if owner == nil {
			a.mu.Unlock()
			return nil // removed since the event
		}
		fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		a.mu.Unlock()
		switch {
		case err == nil:
			a.handle(owner, fd)
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
			owner.broken.Store(true)
			a.remove([]int{listener})
			a.log.Error("a listener is gone, the pod needs another handoff", "netns", owner.ns.ID(), "fd", listener, "error", os.NewSyscallError("accept4", err))
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
