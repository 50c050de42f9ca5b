package hbone

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { testmain.Run(m) }

// tlsConfigs are the two ends of a mutual TLS 1.3 connection.
var tlsConfigs = sync.OnceValues(func() (client, server *tls.Config) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"test"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		panic(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	base := &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		MinVersion:   tls.VersionTLS13, NextProtos: []string{"h2"},
		SessionTicketsDisabled: true,
	}
	client = base.Clone()
	client.RootCAs, client.ServerName = pool, "test"
	server = base.Clone()
	server.ClientCAs, server.ClientAuth = pool, tls.RequireAndVerifyClientCert
	return client, server
})

// tcpPair is a connection over loopback.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	ac, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close(); ac.Close() })
	return d.(*net.TCPConn), ac.(*net.TCPConn)
}

// appPair is an application's connection: its own end, and the file the tunnel relays.
func appPair(t testing.TB) (app *net.TCPConn, file *os.File) {
	t.Helper()
	app, other := tcpPair(t)
	return app, fileOf(t, other)
}

// fileOf takes a connection's socket out of it.
func fileOf(t testing.TB, c *net.TCPConn) *os.File {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd := -1
	raw.Control(func(s uintptr) { fd, err = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) })
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	f := os.NewFile(uintptr(fd), "app")
	t.Cleanup(func() { f.Close() })
	return f
}

// tunnel is a client and a server connected over loopback, with TLS.
func tunnel(t testing.TB, cfg Config, handler func(*Request)) (*ClientConn, *ServerConn) {
	t.Helper()
	a, b := tcpPair(t)
	return tunnelOver(t, a, b, cfg, handler)
}

func tunnelOver(t testing.TB, a, b net.Conn, cfg Config, handler func(*Request)) (*ClientConn, *ServerConn) {
	t.Helper()
	clientTLS, serverTLS := tlsConfigs()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	type accepted struct {
		sc  *ServerConn
		err error
	}
	ch := make(chan accepted, 1)
	go func() {
		sc, err := Accept(ctx, b, serverTLS, cfg)
		ch <- accepted{sc, err}
	}()
	cc, err := Dial(ctx, a, clientTLS, cfg)
	if err != nil {
		t.Fatal("dial:", err)
	}
	got := <-ch
	if got.err != nil {
		t.Fatal("accept:", got.err)
	}
	serveUntilCleanup(t, got.sc, handler)
	t.Cleanup(func() {
		cc.Close()
		within(t, "the client to end", cc.Done())
	})
	return cc, got.sc
}

// serveUntilCleanup runs sc, and ends it with the test.
func serveUntilCleanup(t testing.TB, sc *ServerConn, handler func(*Request)) {
	served := make(chan struct{})
	go func() {
		defer close(served)
		sc.Serve(handler)
	}()
	t.Cleanup(func() {
		sc.Close()
		within(t, "the server to end", served)
	})
}

// within waits for ch, but not for ever.
func within[T any](t testing.TB, what string, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(20 * time.Second):
		buf := make([]byte, 1<<20)
		t.Fatalf("waited too long for %s\n%s", what, buf[:runtime.Stack(buf, true)])
	}
	return v
}

// eventually asks until f is true, but not for ever.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !f(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// relayed is what Relay returned.
type relayed struct {
	Counts
	err error
}

// relay relays s to file, and closes file behind it.
func relay(s *Stream, file *os.File) <-chan relayed {
	ch := make(chan relayed, 1)
	go func() {
		c, err := s.Relay(file)
		file.Close()
		ch <- relayed{c, err}
	}()
	return ch
}

// path is a whole one: application - tunnel - application.
type path struct {
	client, server   *net.TCPConn // the applications' ends
	cStream, sStream *Stream
	cFile            *os.File // what the client's end relays
	cDone, sDone     <-chan relayed
}

// newPath opens one stream on cc; the server's handler is pathHandler.
func newPath(t testing.TB, cc *ClientConn, h *pathHandler) *path {
	t.Helper()
	p := &path{}
	var file *os.File
	p.client, file = appPair(t)
	var next *os.File
	p.server, next = appPair(t)
	h.next <- next
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, _, err := cc.Open(ctx, "192.0.2.1:80", nil)
	if err != nil {
		t.Fatal("open:", err)
	}
	p.cStream, p.cFile = s, file
	p.cDone = relay(s, file)
	served := within(t, "the server's stream", h.streams)
	p.sStream, p.sDone = served.s, served.done
	return p
}

// pathHandler answers 200 and relays to next.
type pathHandler struct {
	t       testing.TB
	next    chan *os.File
	streams chan served
}

type served struct {
	s    *Stream
	done <-chan relayed
}

func newPathHandler(t testing.TB) *pathHandler {
	return &pathHandler{t: t, next: make(chan *os.File, 1), streams: make(chan served)}
}

func (h *pathHandler) handle(r *Request) {
	file := <-h.next
	s, err := r.Respond(200)
	if err != nil {
		h.t.Error("respond:", err)
		return
	}
	ch := make(chan relayed, 1)
	h.streams <- served{s, ch}
	c, err := s.Relay(file)
	file.Close()
	ch <- relayed{c, err}
}

func TestRelayBothWays(t *testing.T) {
	h := newPathHandler(t)
	cc, _ := tunnel(t, DefaultConfig(), h.handle)
	p := newPath(t, cc, h)

	there, back := make([]byte, 3<<20), make([]byte, 5<<20)
	rand.Read(there)
	rand.Read(back)
	go send(p.client, there)
	go send(p.server, back)
	gotThere, gotBack := make(chan []byte, 1), make(chan []byte, 1)
	go receive(p.server, gotThere)
	go receive(p.client, gotBack)
	if !bytes.Equal(within(t, "what was sent", gotThere), there) {
		t.Error("the bytes to the server differ")
	}
	if !bytes.Equal(within(t, "what was answered", gotBack), back) {
		t.Error("the bytes to the client differ")
	}
	if got, want := within(t, "the client's relay", p.cDone), (relayed{Counts{3 << 20, 5 << 20}, nil}); got != want {
		t.Errorf("client: got %+v, want %+v", got, want)
	}
	if got, want := within(t, "the server's relay", p.sDone), (relayed{Counts{5 << 20, 3 << 20}, nil}); got != want {
		t.Errorf("server: got %+v, want %+v", got, want)
	}
	eventually(t, "no stream", func() bool { return cc.Streams() == 0 })
}

// send writes b and half-closes.
func send(c *net.TCPConn, b []byte) {
	c.Write(b)
	c.CloseWrite()
}

// receive reads until the end.
func receive(c *net.TCPConn, ch chan<- []byte) {
	b, _ := io.ReadAll(c)
	ch <- b
}
