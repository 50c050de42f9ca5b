package worldtest

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is an application's end of a connection. One that was dialed or accepted is
// over when patience is; its deadline may be moved.
type Conn struct{ *net.TCPConn }

func newConn(c *net.TCPConn) *Conn {
	c.SetDeadline(time.Now().Add(Patience))
	return &Conn{c}
}

// Socket is what an application does: socket(2), connect(2). It blocks, and waits
// for as long as it has patience. The caller closes it.
func (p *Place) Socket(to netip.AddrPort) (fd int, err error) {
	domain, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port())})
	if to.Addr().Is4() {
		sa.(*unix.SockaddrInet4).Addr = to.Addr().As4()
	} else {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	}
	if _, err = p.Do(func() error {
		fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return os.NewSyscallError("socket", err)
	}); err != nil {
		return -1, err
	}
	timeout := unix.NsecToTimeval(Patience.Nanoseconds())
	for _, option := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		if err == nil {
			err = os.NewSyscallError("setsockopt", unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &timeout))
		}
	}
	if err == nil {
		err = os.NewSyscallError("connect", connect(fd, sa))
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// connect connects, also when a signal of the Go runtime's comes in between: the
// kernel goes on.
func connect(fd int, sa unix.Sockaddr) error {
	err := unix.Connect(fd, sa)
	for err == unix.EINTR {
		err = unix.Connect(fd, sa)
	}
	if err == unix.EISCONN {
		return nil
	}
	return err
}

// Connect is Socket for the Go runtime.
func (p *Place) Connect(to netip.AddrPort) (*Conn, error) {
	fd, err := p.Socket(to)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close() // FileConn has a descriptor of its own
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return newConn(c.(*net.TCPConn)), nil
}

// Dial connects, which must go well. The connection is closed with the test.
func (p *Place) Dial(t *testing.T, to netip.AddrPort) *Conn {
	t.Helper()
	c, err := p.Connect(to)
	if err != nil {
		t.Fatalf("from %s to %v: %v", p.Name, to, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Say writes all of text.
func (c *Conn) Say(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("write %.20q: %v", text, err)
	}
}

// Hears reads exactly text.
func (c *Conn) Hears(t *testing.T, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("read %.20q: got %.20q, %v", text, b[:n], err)
	}
}

// HearsEnd reads the other's FIN.
func (c *Conn) HearsEnd(t *testing.T) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read %d bytes, %v: want the end", n, err)
	}
}

// HearsReset reads the other's RST.
func (c *Conn) HearsReset(t *testing.T) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read %d bytes, %v: want a reset", n, err)
	}
}

// Server is an application that listens.
type Server struct {
	*net.TCPListener
	At netip.AddrPort
}

// Listen listens in the place until the end of the test; on any port with port 0.
func (p *Place) Listen(t *testing.T, at netip.AddrPort) Server {
	t.Helper()
	var l *net.TCPListener
	if _, err := p.Do(func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		return err
	}); err != nil {
		t.Fatalf("in %s: %v", p.Name, err)
	}
	t.Cleanup(func() { l.Close() })
	return Server{l, l.Addr().(*net.TCPAddr).AddrPort()}
}

// Accept takes the next connection. It is closed with the test.
func (s Server) Accept(t *testing.T) *Conn {
	t.Helper()
	s.SetDeadline(time.Now().Add(Patience))
	c, err := s.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return newConn(c)
}

// Service is a server that has each connection handled on a goroutine of its own,
// without a deadline.
type Service struct {
	Server
	handle            func(*Conn)
	conns             []*Conn // all that have come; run's own until it ends
	running, handling sync.WaitGroup
}

// Serve serves in the place, until Stop or the end of the test.
func (p *Place) Serve(t *testing.T, at netip.AddrPort, handle func(*Conn)) *Service {
	t.Helper()
	s := &Service{Server: p.Listen(t, at), handle: handle}
	s.running.Go(s.run)
	t.Cleanup(s.Stop)
	return s
}

func (s *Service) run() {
	for {
		c, err := s.AcceptTCP()
		if err != nil {
			return // closed
		}
		s.conns = append(s.conns, &Conn{c})
		s.handling.Add(1)
		go s.one(s.conns[len(s.conns)-1])
	}
}

func (s *Service) one(c *Conn) {
	defer s.handling.Done()
	s.handle(c)
	c.Close()
}

// Stop closes the listener and all connections, and waits for who handles them.
func (s *Service) Stop() {
	s.Close()
	s.running.Wait()
	for _, c := range s.conns {
		c.Close()
	}
	s.handling.Wait()
}
