package mesh

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/sys/unix"
)

// patience is how long an application waits for anything.
const patience = 15 * time.Second

// socket makes a blocking TCP socket in the place.
func (p place) socket() (fd int, err error) {
	_, err = p.Do(func() error {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		return os.NewSyscallError("socket", err)
	})
	return fd, err
}

// connect is what an application does: socket(2), connect(2).
func (p place) connect(to netip.AddrPort) (*net.TCPConn, error) {
	fd, err := p.socket()
	if err != nil {
		return nil, err
	}
	err = connectSocket(fd, to)
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close() // FileConn has a descriptor of its own
	if err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn), nil
}

// connectSocket connects a blocking socket, which also gets its timeouts.
func connectSocket(fd int, to netip.AddrPort) error {
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	for _, option := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &timeout); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	sa := &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	err := unix.Connect(fd, sa)
	for err == unix.EINTR { // a signal of the Go runtime's; the connect goes on
		err = unix.Connect(fd, sa)
	}
	if err == unix.EISCONN {
		err = nil
	}
	return os.NewSyscallError("connect", err)
}

// dial connects, which must go well. The connection is closed with the test.
func (p place) dial(t *testing.T, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := p.connect(to)
	if err != nil {
		t.Fatalf("from %s to %v: %v", p.path, to, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// listen listens in the place until the end of the test.
func (p place) listen(t *testing.T, at netip.AddrPort) *net.TCPListener {
	t.Helper()
	fd, err := p.socket()
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	if err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()})
	}
	if err == nil {
		err = unix.Listen(fd, unix.SOMAXCONN)
	}
	if err != nil {
		t.Fatalf("listen in %s: %v", p.path, err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// serve listens, and has each connection served on a goroutine of its own. They
// end with the test, or by stop.
func (p place) serve(t *testing.T, at netip.AddrPort, handle func(net.Conn)) (stop func()) {
	t.Helper()
	s := &server{l: p.listen(t, at), handle: handle, open: map[net.Conn]struct{}{}}
	s.wg.Add(1)
	go s.accept()
	t.Cleanup(s.close)
	return s.close
}

type server struct {
	l      *net.TCPListener
	handle func(net.Conn)
	wg     sync.WaitGroup
	mu     sync.Mutex
	open   map[net.Conn]struct{} // nil once closed
}

func (s *server) accept() {
	defer s.wg.Done()
	for {
		c, err := s.l.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		if s.open == nil {
			c.Close()
			s.mu.Unlock()
			return
		}
		s.open[c] = struct{}{}
		s.wg.Add(1)
		s.mu.Unlock()
		go s.one(c)
	}
}

func (s *server) one(c net.Conn) {
	defer s.wg.Done()
	s.handle(c)
	c.Close()
	s.mu.Lock()
	delete(s.open, c)
	s.mu.Unlock()
}

func (s *server) close() {
	s.l.Close()
	s.mu.Lock()
	for c := range s.open {
		c.Close()
	}
	s.open = nil
	s.mu.Unlock()
	s.wg.Wait()
}

// echoTwice is the pod's application on 8080: it says everything twice.
func (p *pod) echoTwice(t *testing.T) (stop func()) {
	t.Helper()
	return p.serve(t, p.at(8080), readDoubleWrite)
}

func readDoubleWrite(c net.Conn) {
	b := make([]byte, 64<<10)
	for {
		n, err := c.Read(b)
		if _, werr := c.Write(append(b[:n:n], b[:n]...)); err != nil || werr != nil {
			return
		}
	}
}

const hello = "hello world"

// says and hears are a request and its answer.
func says(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("write %q: %v", text, err)
	}
}

func hears(t *testing.T, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("read %q: got %q, %v", text, b[:n], err)
	}
}

// talks has the echo-twice server answer once on a connection.
func talks(t *testing.T, c net.Conn) {
	t.Helper()
	says(t, c, hello)
	hears(t, c, hello+hello)
}

// request is a connection for one request and its answer.
func (p place) request(t *testing.T, to netip.AddrPort, answer string) {
	t.Helper()
	c := p.dial(t, to)
	says(t, c, hello)
	hears(t, c, answer)
	c.Close()
}

// hearsReset reads the other's RST.
func hearsReset(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read %d bytes, %v: want a reset", n, err)
	}
}

// isRefused connects, which goes well, and is reset.
func (p place) isRefused(t *testing.T, to netip.AddrPort) {
	t.Helper()
	c := p.dial(t, to)
	if _, err := io.WriteString(c, hello); err == nil {
		hearsReset(t, c)
	} else if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Errorf("write: %v: want a reset", err)
	}
}

// breaks waits for the end of a connection, in whatever way.
func breaks(t *testing.T, c net.Conn) {
	t.Helper()
	for {
		if _, err := c.Read(make([]byte, 64<<10)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the connection goes on")
			return
		} else if err != nil {
			return
		}
	}
}

// forwardTo serves a connection by one to another place, until both have ended.
func (p place) forwardTo(c io.ReadWriter, to netip.AddrPort) {
	onward, err := p.connect(to)
	if err != nil {
		return
	}
	defer onward.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(onward, c)
		onward.CloseWrite()
	}()
	io.Copy(c, onward)
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		w.CloseWrite()
	}
	<-done
}

// forwardByProxyHeader is a waypoint's application behind a PROXY tunnel: each
// connection says where it wants to go. headers gets what it said.
func (p place) forwardByProxyHeader(headers chan<- *proxyproto.Header) func(net.Conn) {
	return func(c net.Conn) {
		r := bufio.NewReader(c)
		h, err := proxyproto.Read(r)
		if err != nil {
			return
		}
		headers <- h
		p.forwardTo(buffered{r, c.(*net.TCPConn)}, h.DestinationAddr.(*net.TCPAddr).AddrPort())
	}
}

// buffered is a connection of which something has been read already.
type buffered struct {
	*bufio.Reader
	c *net.TCPConn
}

func (b buffered) Write(p []byte) (int, error) { return b.c.Write(p) }
func (b buffered) CloseWrite() error           { return b.c.CloseWrite() }
