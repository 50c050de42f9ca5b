package inpod

import (
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

// settle is how long a leaving listener goes on accepting what it was chosen for
// before. A handshake that has begun on it ends there or is reset, and takes a
// round trip; or a second more, when its SYN-ACK or ACK is lost and sent again. A
// client that is slower than that is lost.
const settle = 1200 * time.Millisecond

// drain takes the listeners out of their pods without losing a connection to the
// next ztunnel, and gives the connections that run until the deadline.
//
// Two ztunnels in a pod share each port by SO_REUSEPORT (socket(7)): the kernel
// chooses a listener for each connection. To close one resets what waits in its
// queue. So a leaver first takes itself out of the choice, then accepts until
// its queue stays empty, and only then closes.
func (e *engine) drain(pods []*pod, deadline time.Duration) {
	if len(pods) == 0 {
		return
	}
	end := time.Now().Add(deadline)
	var shared atomic.Bool // with another ztunnel
	var wg sync.WaitGroup
	// A few at once: most of a departure is waiting.
	slots := make(chan struct{}, 8)
	for _, p := range pods {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			e.acceptor.remove(p.shared())
			for _, s := range p.shared() {
				if stepAside(p, s.fd, s.port, func(conn int) { e.accepted(p, s.port, conn) }) {
					shared.Store(true)
				}
			}
		})
	}
	wg.Wait()
	// Meanwhile all are out of the choice; what they still get began before. With
	// nobody else there, a refusal now is as good as one later.
	for until := time.Now().Add(settle); shared.Load(); time.Sleep(5 * time.Millisecond) {
		for _, p := range pods {
			for _, s := range p.shared() {
				acceptAll(s.fd, func(conn int) { e.accepted(p, s.port, conn) })
			}
		}
		if now := time.Now(); now.After(until) || now.After(end) {
			break
		}
	}
	for _, p := range pods {
		e.acceptor.remove(p.sockets) // until now, DNS was answered
		p.life.Lock()
		closeAll(p.sockets)
		p.sockets = nil
		p.life.Unlock()
	}
	for _, p := range pods {
		p.proxy.Drain()
	}
	for _, p := range pods {
		p.proxy.WaitIdle(time.Until(end))
	}
	e.answerer.waitIdle(time.Until(end))
}

// shared are the listeners that the next ztunnel has, too, and whose connections
// nobody may lose. Those of DNS answer until they are closed: one query that is lost
// then is asked again by itself, but one of two for a second is not to be borne.
func (p *pod) shared() []socket {
	return slices.DeleteFunc(slices.Clone(p.sockets), func(s socket) bool { return s.port == proxy.PortDNS })
}

// stepAside makes the kernel choose another listener of the port's group than
// fd, and tells whether there is one, as far as can be known. What waits in fd's
// queue goes to handle.
//
// The choice is a classic BPF program that returns the number of a member, and
// nobody tells a member its own number. The older one has 0, as a rule, and it
// is the one that leaves; but a connection of our own finds out.
func stepAside(p *pod, fd int, port uint16, handle func(conn int)) bool {
	for _, other := range []uint32{1, 0} {
		// With a number beyond the last member the kernel goes by the hash again.
		prog := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: other}}
		err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: 1, Filter: &prog[0]})
		if err != nil {
			return false // no group: the port is not shared
		}
		if !chosen(p, fd, port, handle) {
			return true
		}
	}
	return false // chosen whatever we say
}

// chosen tells whether a new connection to the port comes to fd.
func chosen(p *pod, fd int, port uint16, handle func(conn int)) bool {
	var probe int
	if _, err := p.ns.Do(func() (err error) {
		probe, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		return os.NewSyscallError("socket", err)
	}); err != nil {
		return false
	}
	// By a reset: who gets it instead of us finds it gone, and has nothing to say.
	defer unix.Close(probe)
	unix.SetsockoptLinger(probe, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	// Within one namespace, over lo, the handshake is over when connect returns,
	// even if that says EINPROGRESS. With lo down there is no telling.
	err := unix.Connect(probe, &unix.SockaddrInet4{Port: int(port), Addr: [4]byte{127, 0, 0, 1}})
	if err != nil && err != unix.EINPROGRESS {
		return false
	}
	self, err := unix.Getsockname(probe)
	if err != nil {
		return false
	}
	mine, ok := self.(*unix.SockaddrInet4)
	if !ok {
		return false
	}
	found := false
	for {
		conn, peer, err := unix.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return found
		}
		if samePort(peer, mine.Port) {
			found = true
			unix.Close(conn)
			continue
		}
		handle(conn)
	}
}

// samePort tells whether an accepted connection is that of the probe: only it
// comes from that port of the pod's own loopback.
func samePort(peer unix.Sockaddr, port int) bool {
	switch sa := peer.(type) {
	case *unix.SockaddrInet4:
		return sa.Addr == [4]byte{127, 0, 0, 1} && sa.Port == port
	case *unix.SockaddrInet6: // ::ffff:127.0.0.1
		return sa.Addr == [16]byte{10: 0xff, 11: 0xff, 12: 127, 15: 1} && sa.Port == port
	}
	return false
}

// acceptAll takes what waits at a listener.
func acceptAll(fd int, handle func(conn int)) {
	for {
		conn, _, err := unix.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return
		}
		handle(conn)
	}
}
