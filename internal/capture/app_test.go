package capture

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long an application waits for anything.
const patience = 15 * time.Second

// socket makes a blocking socket in the place.
func (p *place) socket(addr netip.Addr, kind int) (fd int, err error) {
	domain := unix.AF_INET
	if addr.Is6() {
		domain = unix.AF_INET6
	}
	_, err = p.Do(func() error {
		fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, 0)
		return os.NewSyscallError("socket", err)
	})
	return fd, err
}

// connect is what an application does: socket(2), connect(2).
func (p *place) connect(to netip.AddrPort) (*net.TCPConn, error) {
	fd, err := p.socket(to.Addr(), unix.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	if err := connect(fd, to); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return tcpConn(fd)
}

// connect connects a blocking socket, patiently.
func connect(fd int, to netip.AddrPort) error {
	timeout := unix.NsecToTimeval(patience.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout); err != nil {
		return err
	}
	err := unix.Connect(fd, sockaddr(to))
	for err == unix.EINTR { // the Go runtime's signals; the connect goes on
		err = unix.Connect(fd, sockaddr(to))
	}
	if err == unix.EISCONN {
		err = nil
	}
	return os.NewSyscallError("connect", err)
}

// tcpConn takes over a connected socket.
func tcpConn(fd int) (*net.TCPConn, error) {
	f := os.NewFile(uintptr(fd), "connection")
	defer f.Close() // FileConn has a descriptor of its own
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn), nil
}

// dial connects, which must go well. The connection is closed with the test.
func (p *place) dial(t *testing.T, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := p.connect(to)
	if err != nil {
		t.Fatalf("from %s to %v: %v", p.name, to, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// server is an application that listens.
type server struct {
	*net.TCPListener
	addr netip.AddrPort
}

// listen listens in the place until the end of the test; on any port with port 0.
func (p *place) listen(t *testing.T, ip netip.Addr, port uint16) server {
	t.Helper()
	fd, err := p.socket(ip, unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	if err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err == nil {
		err = unix.Bind(fd, sockaddr(netip.AddrPortFrom(ip, port)))
	}
	if err == nil {
		err = unix.Listen(fd, unix.SOMAXCONN)
	}
	if err != nil {
		t.Fatalf("listen in %s: %v", p.name, err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return server{l.(*net.TCPListener), l.Addr().(*net.TCPAddr).AddrPort()}
}

// accept takes the next connection. It is closed with the test.
func (s server) accept(t *testing.T) *net.TCPConn {
	t.Helper()
	s.SetDeadline(time.Now().Add(patience))
	c, err := s.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { c.Close() })
	return c
}

// packets is a UDP socket in the place, bound to ip.
func (p *place) packets(t *testing.T, addr netip.AddrPort) *net.UDPConn {
	t.Helper()
	fd, err := p.socket(addr.Addr(), unix.SOCK_DGRAM)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "packets")
	defer f.Close()
	if err := unix.Bind(fd, sockaddr(addr)); err != nil {
		t.Fatalf("bind in %s: %v", p.name, err)
	}
	c, err := net.FilePacketConn(f)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func local(c net.Conn) netip.AddrPort  { return c.LocalAddr().(*net.TCPAddr).AddrPort() }
func remote(c net.Conn) netip.AddrPort { return c.RemoteAddr().(*net.TCPAddr).AddrPort() }

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
	n, err := io.ReadFull(c, b)
	if err != nil || string(b) != text {
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

// reset ends a connection by a RST.
func reset(t *testing.T, c *net.TCPConn) {
	t.Helper()
	if err := c.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// talk is a whole exchange over a new connection, which must go well.
func talk(t *testing.T, from *place, to server) {
	t.Helper()
	c := from.dial(t, to.addr)
	say(t, c, "ping")
	s := to.accept(t)
	hears(t, s, "ping")
	say(t, s, "pong")
	hears(t, c, "pong")
	c.Close()
	hearsEnd(t, s)
	s.Close()
}

// castagnoli is CRC-32C, which processors have an instruction for.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// send writes n bytes that no other seed has, ends the direction, and reports
// their checksum: of all n, whatever has become of them.
func send(c *net.TCPConn, n int64, seed uint64, sum chan<- uint32) {
	block := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(block)
	crc := crc32.New(castagnoli)
	for i := uint64(0); n > 0; i++ {
		b := block[:min(n, int64(len(block)))]
		binary.LittleEndian.PutUint64(block, i) // no two alike
		crc.Write(b)
		c.Write(b)
		n -= int64(len(b))
	}
	c.CloseWrite()
	sum <- crc.Sum32()
}

// arrives reads to the end what send has sent.
func arrives(t *testing.T, c *net.TCPConn, n int64, sum <-chan uint32) {
	t.Helper()
	crc := crc32.New(castagnoli)
	got, err := io.CopyBuffer(crc, onlyReader{c}, make([]byte, 1<<20))
	if err != nil || got != n {
		t.Errorf("after %d bytes of %d: %v", got, n, err)
	} else if crc.Sum32() != <-sum {
		t.Errorf("%d bytes have arrived, but not those that were sent", n)
	}
}

// onlyReader hides what io.Copy would prefer to the buffer.
type onlyReader struct{ io.Reader }
