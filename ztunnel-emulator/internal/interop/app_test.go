package interop

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// socket makes a blocking TCP socket in the pod.
func (p *pod) socket() (fd int, err error) {
	_, err = p.Do(func() error {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return os.NewSyscallError("socket", err)
	})
	return fd, err
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

// dial is what an application does: socket(2), connect(2). The connection is
// closed with the test.
func (p *pod) dial(t *testing.T, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	fd, err := p.socket()
	must(t, err)
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close() // FileConn has a descriptor of its own
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout))
	if err := unix.Connect(fd, sockaddr(to)); err != nil {
		t.Fatalf("from %s to %v: %v", p.name, to, err)
	}
	c, err := net.FileConn(f)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	return c.(*net.TCPConn)
}

// server is an application that listens.
type server struct {
	*net.TCPListener
	addr netip.AddrPort
}

// listen listens on some port of the pod until the end of the test.
func (p *pod) listen(t *testing.T) server {
	t.Helper()
	return p.listenAt(t, 0)
}

func (p *pod) listenAt(t *testing.T, port uint16) server {
	t.Helper()
	fd, err := p.socket()
	must(t, err)
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	must(t, unix.Bind(fd, sockaddr(p.at(port))))
	must(t, unix.Listen(fd, unix.SOMAXCONN))
	l, err := net.FileListener(f)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return server{l.(*net.TCPListener), l.Addr().(*net.TCPAddr).AddrPort()}
}

// accept takes the next connection. It is closed with the test.
func (s server) accept(t *testing.T) *net.TCPConn {
	t.Helper()
	s.SetDeadline(time.Now().Add(patience))
	c, err := s.AcceptTCP()
	must(t, err)
	c.SetDeadline(time.Now().Add(2 * patience))
	t.Cleanup(func() { c.Close() })
	return c
}

// run serves all connections with f until the end of the test, and waits for f.
func (p *pod) run(t *testing.T, f func(c *net.TCPConn)) netip.AddrPort {
	t.Helper()
	return p.runAt(t, 0, f)
}

func (p *pod) runAt(t *testing.T, port uint16, f func(c *net.TCPConn)) netip.AddrPort {
	t.Helper()
	l := p.listenAt(t, port)
	done := make(chan struct{})
	go serveAll(l, f, done)
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return l.addr
}

func serveAll(l server, f func(c *net.TCPConn), done chan<- struct{}) {
	defer close(done)
	served := make(chan struct{})
	n := 0
	for ; ; n++ {
		c, err := l.AcceptTCP()
		if err != nil {
			break
		}
		go func() {
			f(c)
			c.Close()
			served <- struct{}{}
		}()
	}
	for range n {
		<-served
	}
}

// echo says everything back, and then ends too.
func echo(c *net.TCPConn) {
	io.Copy(struct{ io.Writer }{c}, c) // not by splice(2), whose pipes stay until they are collected
	c.CloseWrite()
}

// say writes all of text.
func say(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("write %.20q: %v", text, err)
	}
}

// hears reads exactly text.
func hears(t *testing.T, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("read %.20q: got %.20q, %v", text, b[:n], err)
	}
}

// hearsEnd reads the other's FIN.
func hearsEnd(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read %d bytes, %v: want the end", n, err)
	}
}

// hearsReset reads the other's RST.
func hearsReset(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read %d bytes, %v: want a reset", n, err)
	}
}
