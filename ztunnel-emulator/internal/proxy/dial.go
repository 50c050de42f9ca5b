package proxy

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ConnectTimeout is how long ztunnel waits for a connection, socket and bind
// included.
const ConnectTimeout = 10 * time.Second

// errTimeout is a connect that nobody has answered.
var errTimeout = errors.New("timed out")

// KeepAlive is SO_KEEPALIVE and what belongs to it (tcp(7)).
type KeepAlive struct {
	Enabled        bool
	Idle, Interval time.Duration // whole seconds
	Count          int
	// UserTimeout also sets TCP_USER_TIMEOUT, to the time after which the probes
	// would give up.
	UserTimeout bool
}

// DefaultKeepAlive is the real ztunnel's: a dead peer is noticed after half an hour.
func DefaultKeepAlive() KeepAlive {
	return KeepAlive{Enabled: true, Idle: 180 * time.Second, Interval: 180 * time.Second, Count: 9}
}

// Set sets it on a socket. What is accepted from a listener inherits it.
func (k KeepAlive) Set(fd int) error {
	if !k.Enabled {
		return nil
	}
	options := []struct {
		name          string
		level, option int
		value         int
	}{
		{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(k.Idle / time.Second)},
		{"TCP_KEEPINTVL", unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(k.Interval / time.Second)},
		{"TCP_KEEPCNT", unix.IPPROTO_TCP, unix.TCP_KEEPCNT, k.Count},
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	}
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			return os.NewSyscallError("setsockopt "+o.name, err)
		}
	}
	if k.UserTimeout {
		timeout := k.Idle + time.Duration(k.Count)*k.Interval
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(timeout.Milliseconds())); err != nil {
			return os.NewSyscallError("setsockopt TCP_USER_TIMEOUT", err)
		}
	}
	return nil
}

// socket makes a marked, non-blocking socket in the pod. The caller owns it.
//
// The mark is not an ornament: without it the pod's rules would capture what we
// send, and it would come back to us.
func (p *Pod) socket(addr netip.Addr, kind int) (fd int, err error) {
	family := unix.AF_INET
	if addr.Is6() {
		family = unix.AF_INET6
	}
	err = p.enter(func() (err error) {
		fd, err = unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return -1, err
	}
	if p.config.Mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(p.config.Mark)); err != nil {
			unix.Close(fd)
			if err == unix.EPERM {
				p.sayNoMark.Do(func() {
					p.config.Log.Warn("what the pod's rules capture goes nowhere: to mark sockets takes CAP_NET_ADMIN in the pod", "pod", p.String())
				})
			}
			return -1, os.NewSyscallError("setsockopt SO_MARK", err)
		}
	}
	return fd, nil
}

// dial connects from inside the pod. With a source that is not the destination
// itself, the peer sees that address; a kernel that forbids it is a warning, and
// the peer sees the pod's. The session knows the connection from its first moment,
// and can cut it. The caller owns the connection.
func (p *Pod) dial(s *session, dst netip.AddrPort, src netip.Addr) (Conn, error) {
	deadline := time.Now().Add(p.connectTime())
	c, connected, err := p.start(dst, src)
	if err != nil {
		return Conn{}, err
	}
	c.SetWriteDeadline(deadline)
	if err := p.connecting(s, c); err != nil {
		c.Close()
		return Conn{}, err
	}
	if !connected {
		err = c.awaitConnect()
	}
	c.SetWriteDeadline(time.Time{})
	if cause := s.cause.Load(); cause != nil {
		// It came with a deadline, which was taken for the connect's own, or has
		// just been undone.
		err = *cause
	}
	if err != nil {
		c.Close()
		return Conn{}, err
	}
	return c, nil
}

// start begins to connect, from src if that is set.
func (p *Pod) start(dst netip.AddrPort, src netip.Addr) (c Conn, connected bool, err error) {
	// A pod that calls itself through ztunnel: its own address is the right one.
	spoofed := src.IsValid() && src != dst.Addr() && src.Is4() == dst.Addr().Is4()
	for try := 1; ; try++ {
		fd, err := p.lastingSocket(dst.Addr())
		if err != nil {
			return Conn{}, false, err
		}
		if spoofed {
			if err := spoof(fd, src); err != nil {
				p.config.Log.Warn("the application will see ztunnel's address", "src", src, "error", err)
			}
		}
		c, connected, err = startConnect(fd, dst)
		if spoofed && errors.Is(err, unix.EADDRNOTAVAIL) && try < tries {
			continue // this port calls dst already, or did so a minute ago
		}
		return c, connected, err
	}
}

// lastingSocket makes a socket in the pod for a connection that may last.
func (p *Pod) lastingSocket(addr netip.Addr) (int, error) {
	fd, err := p.socket(addr, unix.SOCK_STREAM)
	if err != nil {
		return -1, err
	}
	err = os.NewSyscallError("setsockopt TCP_NODELAY", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	if err == nil {
		err = p.config.KeepAlive.Set(fd)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// finishConnect connects a socket, which it takes over, before ctx ends.
func finishConnect(ctx context.Context, fd int, dst netip.AddrPort) (Conn, error) {
	c, connected, err := startConnect(fd, dst)
	if err != nil || connected {
		return c, err
	}
	stop := context.AfterFunc(ctx, func() { abort(c) })
	err = c.awaitConnect()
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		c.Close()
		return Conn{}, err
	}
	return c, nil
}

func (p *Pod) connectTime() time.Duration {
	if p.config.ConnectTime != 0 {
		return p.config.ConnectTime
	}
	return ConnectTimeout
}

// startConnect begins to connect the socket, which it takes over. Within one
// machine that is often all.
func startConnect(fd int, dst netip.AddrPort) (c Conn, connected bool, err error) {
	err = unix.Connect(fd, sockaddr(dst))
	if err != nil && err != unix.EINPROGRESS {
		unix.Close(fd)
		return Conn{}, false, os.NewSyscallError("connect", err)
	}
	return NewConn(fd), err == nil, nil
}

// awaitConnect waits until the peer has answered, or the write deadline has come.
func (c Conn) awaitConnect() error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Write(func(fd uintptr) bool {
		var code int
		code, result = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if result != nil {
			return true
		}
		if code != 0 {
			result = os.NewSyscallError("connect", unix.Errno(code))
			return true
		}
		_, err := unix.Getpeername(int(fd))
		return err == nil // ENOTCONN: not yet
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errTimeout
	}
	return errors.Join(err, result)
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// resetFD closes a connection with a RST: the peer is told that it is over, and
// nothing of it lingers in the pod.
func resetFD(fd int) {
	unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	unix.Close(fd)
}

// reset is resetFD of a connection.
func (c Conn) reset() {
	c.lingerNot()
	c.Close()
}

// lingerNot makes the connection's close a reset.
func (c Conn) lingerNot() {
	c.control(func(fd int) error {
		return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	})
}
