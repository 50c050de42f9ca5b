package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/testmain"
	"ambient-emulator/ztunnel-emulator/internal/hbone"
	"ambient-emulator/ztunnel-emulator/internal/identity"
	"ambient-emulator/ztunnel-emulator/internal/workload"
)

// Two pods that share the tests' own namespace, each with an address of lo.
const (
	clientIP, serverIP = "127.0.1.1", "127.0.1.2"
	vip                = "127.0.9.9:80" // of the service that is the server's 8080
)

// cast is who there is. more goes to the server.
func cast(more string) string {
	return fmt.Sprintf(`
workloads:
- {uid: client, name: client, namespace: demo, serviceAccount: client, trustDomain: td, workloadIps: [%s], protocol: HBONE, services: {}}
- {uid: server, name: server, namespace: demo, serviceAccount: server, trustDomain: td, workloadIps: [%s], protocol: HBONE, services: {demo/svc: {80: 8080}}%s}
- {uid: node, name: node, namespace: demo, serviceAccount: node, trustDomain: td, workloadIps: [127.0.0.1], services: {}}
services:
- {name: svc, namespace: demo, hostname: svc, vips: [/127.0.9.9], ports: {80: 8080}}
policies:
- {name: nobody, namespace: demo, scope: WorkloadSelector, action: Deny, dryRun: false, rules: [[[{notPrincipals: [!Suffix nobody]}]]]}
`, clientIP, serverIP, more)
}

// world is a mesh with the two pods, and what it has said.
type world struct {
	*Mesh
	file           string
	config         *Config
	client, server *Pod
	said           *lines
	apps           sync.WaitGroup
}

func newWorld(t *testing.T) *world {
	t.Helper()
	file := filepath.Join(t.TempDir(), "mesh.yaml")
	if err := os.WriteFile(file, []byte(cast("")), 0o600); err != nil {
		t.Fatal(err)
	}
	quiet := slog.New(slog.DiscardHandler)
	store, err := workload.Open(file, "", quiet)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := identity.OpenCA(filepath.Join(t.TempDir(), "ca"))
	if err != nil {
		t.Fatal(err)
	}
	said := &lines{}
	w := &world{file: file, said: said, Mesh: &Mesh{
		Store: store, Identities: identity.NewManager(ca, identity.Options{Log: quiet}),
		HBONE: hbone.DefaultConfig(), ResponseBaggage: true, LocalhostAppTunnel: true, Log: quiet,
	}}
	w.config = &Config{Mesh: w.Mesh, Log: slog.New(slog.NewTextHandler(said, nil)), KeepAlive: DefaultKeepAlive()}
	w.client, w.server = w.pod("client"), w.pod("server")
	ctx, cancel := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { w.Watch(ctx) })
	t.Cleanup(func() {
		w.client.Close()
		w.server.Close()
		cancel()
		watching.Wait()
		w.Identities.Close()
		store.Close()
		w.apps.Wait()
		closePipes()
	})
	return w
}

func (w *world) pod(name string) *Pod {
	here := func(f func() error) error { return f() }
	return w.config.NewPod(Identity{Name: name, Namespace: "demo", ServiceAccount: name}, here, nil)
}

// capture hands what comes to addr to p, as if it had come to port: by TPROXY, which
// leaves the local address as it was.
func (w *world) capture(t *testing.T, addr string, p *Pod, port uint16) {
	t.Helper()
	serve(t, addr, func(c net.Conn) { p.Serve(port, detach(t, c)) })
}

// echo is the server's application.
func (w *world) echo(t *testing.T) {
	t.Helper()
	serve(t, serverIP+":8080", func(c net.Conn) {
		w.apps.Go(func() {
			defer c.Close()
			// Not of the connections themselves: Go would splice, and keep its pipes
			// for a while, where tests count them.
			io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		})
	})
}

// tunnels lets the server take tunnels, and captures what is for the service.
func (w *world) tunnels(t *testing.T) {
	t.Helper()
	w.capture(t, serverIP+":15008", w.server, PortInbound)
	w.capture(t, vip, w.client, PortOutbound)
}

// tunnel is one of the client's, without a pool.
func (w *world) tunnel(t *testing.T, raw net.Conn) *hbone.ClientConn {
	t.Helper()
	own := identity.ID{TrustDomain: "td", Namespace: "demo", ServiceAccount: "client"}
	peer := identity.ID{TrustDomain: "td", Namespace: "demo", ServiceAccount: "server"}
	c, err := hbone.Dial(t.Context(), raw, w.Identities.ClientConfig(own, []identity.ID{peer}), w.HBONE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); <-c.Done() })
	return c
}

// rewrite changes the file: the server's entry gets more.
func (w *world) rewrite(t *testing.T, more string) {
	t.Helper()
	if err := os.WriteFile(w.file+".new", []byte(cast(more)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(w.file+".new", w.file); err != nil {
		t.Fatal(err)
	}
}

// serve hands connections to take until the test ends.
func serve(t *testing.T, addr string, take func(net.Conn)) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			take(c)
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
}

func dial(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// talk says something and hears it back.
func talk(t *testing.T, c io.ReadWriter) {
	t.Helper()
	fmt.Fprint(c, "hello")
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); string(got) != "hello" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
}

// lines is what was logged.
type lines struct{ testmain.Log }

// with returns the first line with all of parts in it, for which it waits.
func (l *lines) with(t *testing.T, parts ...string) string {
	t.Helper()
	var found string
	waitFor(t, fmt.Sprintf("line with %q", parts), func() bool {
	line:
		for line := range strings.Lines(l.String()) {
			for _, part := range parts {
				if !strings.Contains(line, part) {
					continue line
				}
			}
			found = line
			return true
		}
		return false
	})
	return found
}

// A connection to a service goes through a tunnel, and both sides say so.
func TestThroughATunnel(t *testing.T) {
	w := newWorld(t)
	w.tunnels(t)
	w.echo(t)
	c := dial(t, vip)
	talk(t, c)
	c.CloseWrite()
	if rest, err := io.ReadAll(c); len(rest) != 0 || err != nil {
		t.Errorf("%q, %v", rest, err)
	}
	for _, direction := range []string{"outbound", "inbound"} {
		line := w.said.with(t, "connection complete", "direction="+direction)
		if !strings.Contains(line, "bytes_sent=5 bytes_recv=5") || strings.Contains(line, "error=") {
			t.Error(line)
		}
	}
}

// A tunnel whose handshake ends when the pod has ended is closed: nobody else would
// do it, and the pod's end waits for it.
func TestTunnelOfAPodThatHasEnded(t *testing.T) {
	w := newWorld(t)
	client, fd := tcpPair(t)
	tun := w.server.track(fd, true)
	own := identity.ID{TrustDomain: "td", Namespace: "demo", ServiceAccount: "server"}
	accepted := make(chan *hbone.ServerConn, 1)
	go func() {
		conn, err := hbone.Accept(context.Background(), tun, w.Identities.ServerConfig(own), w.HBONE)
		if err != nil {
			t.Error(err)
		}
		accepted <- conn
	}()
	w.tunnel(t, client)
	conn := <-accepted
	w.server.Close()
	tun.established(conn)
	ended := make(chan error, 1)
	go func() { ended <- conn.Serve(func(*hbone.Request) {}) }()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("the tunnel goes on")
		conn.Close()
		<-ended
	}
}

// A tunnel that comes just before the pod drains costs no connection: it is told to
// go elsewhere, and is not cut.
func TestDrainDuringAHandshake(t *testing.T) {
	w := newWorld(t)
	w.echo(t)
	w.capture(t, serverIP+":15008", w.server, PortInbound)
	raw := dial(t, serverIP+":15008")
	waitFor(t, "tunnel", func() bool {
		w.server.mu.Lock()
		defer w.server.mu.Unlock()
		return len(w.server.tunnels) == 1
	})
	w.server.Drain()
	closed := make(chan struct{})
	go func() {
		w.server.WaitIdle(10 * time.Second)
		w.server.Close()
		close(closed)
	}()
	select {
	case <-closed:
		t.Fatal("nobody has waited for the handshake")
	case <-time.After(50 * time.Millisecond):
	}
	c := w.tunnel(t, raw)
	s, _, err := c.Open(t.Context(), serverIP+":8080", nil)
	switch {
	case errors.Is(err, hbone.ErrNotSent):
	case err != nil:
		t.Errorf("neither served nor sent elsewhere: %v", err)
	default:
		talk(t, s)
		s.CloseWrite()
		s.Close()
	}
	began := time.Now()
	<-closed
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the drain has taken %v", took)
	}
}

// A pod ends at once, however many of its tunnels nobody reads any more.
func TestCloseWithStuckTunnels(t *testing.T) {
	const many = 16
	w := newWorld(t)
	w.capture(t, serverIP+":15008", w.server, PortInbound)
	serve(t, serverIP+":8080", func(c net.Conn) {
		w.apps.Go(func() {
			defer c.Close()
			for {
				if _, err := c.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		})
	})
	w.HBONE.StreamWindow, w.HBONE.ConnWindow = 1<<30, 1<<30 // the client's
	for range many {
		d := &deaf{TCPConn: dial(t, serverIP+":15008"), hears: make(chan struct{})}
		d.SetReadBuffer(4096)
		c := w.tunnel(t, d)
		t.Cleanup(func() { close(d.hears) })
		if _, _, err := c.Open(t.Context(), serverIP+":8080", nil); err != nil {
			t.Fatal(err)
		}
		d.mu.Lock()
		d.deaf = true
		d.mu.Unlock()
	}
	waitFor(t, "a standstill", w.standstill())
	began := time.Now()
	w.server.Close()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the end of the pod has taken %v", took)
	}
}

// deaf is a connection that stops reading.
type deaf struct {
	*net.TCPConn
	hears chan struct{}
	mu    sync.Mutex
	deaf  bool
}

func (d *deaf) SyscallConn() {} // not to be read otherwise

func (d *deaf) Read(p []byte) (int, error) {
	d.mu.Lock()
	deaf := d.deaf
	d.mu.Unlock()
	if deaf {
		<-d.hears
	}
	return d.TCPConn.Read(p)
}

// standstill tells when the server's tunnels have sent nothing for a while.
func (w *world) standstill() func() bool {
	last, since := int64(-1), time.Now()
	return func() bool {
		var sent int64
		w.server.mu.Lock()
		for s := range w.server.open {
			if s.stream != nil {
				sent += s.stream.Counts().Sent
			}
		}
		w.server.mu.Unlock()
		if sent != last {
			last, since = sent, time.Now()
		}
		return sent > 0 && time.Since(since) > 300*time.Millisecond
	}
}

// A policy that the pod's own entry names from now on counts for connections that
// run, in a tunnel and without one.
func TestPolicyNamedLater(t *testing.T) {
	w := newWorld(t)
	w.tunnels(t)
	w.capture(t, serverIP+":8081", w.server, PortInboundPassthrough)
	w.echo(t)
	in := dial(t, vip)
	talk(t, in)
	w.rewrite(t, ", authorizationPolicies: [demo/nobody]")
	if _, err := in.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection goes on: %v", err)
	}
	w.said.with(t, "direction=inbound", `error="connection closed due to policy change"`)
}

// A connection that is cut before it has a socket onward does not wait for one.
func TestCutBeforeConnect(t *testing.T) {
	w := newWorld(t)
	_, accepted := tcpPair(t)
	defer accepted.Close()
	s := &session{accepted: accepted}
	w.server.begin(s)
	defer w.server.forget(s)
	w.server.cut(s, errPolicyChange)
	began := time.Now()
	_, err := w.server.dial(s, silent(t, "127.0.0.1"), netip.Addr{})
	if took := time.Since(began); err != errPolicyChange || took > 5*time.Second {
		t.Errorf("%v after %v", err, took)
	}
}

// A connection that a policy forbids while it waits for the application is refused
// by the policy, and not for want of an application.
func TestPolicyChangeDuringConnect(t *testing.T) {
	w := newWorld(t)
	w.capture(t, serverIP+":15008", w.server, PortInbound)
	c := w.tunnel(t, dial(t, serverIP+":15008"))
	app := silent(t, serverIP)
	opened := make(chan error, 1)
	go func() {
		_, _, err := c.Open(t.Context(), app.String(), nil)
		opened <- err
	}()
	waitFor(t, "a connect", func() bool {
		w.server.mu.Lock()
		defer w.server.mu.Unlock()
		for s := range w.server.open {
			if s.onward.File != nil {
				return true
			}
		}
		return false
	})
	w.rewrite(t, ", authorizationPolicies: [demo/nobody]")
	var se *hbone.StatusError
	if err := <-opened; !errors.As(err, &se) || se.Status != http.StatusUnauthorized {
		t.Errorf("%v, want 401", err)
	}
	w.said.with(t, "connection complete", `error="connection closed due to policy change"`)
}

// silent is an address where connects are not answered: the queue is full.
func silent(t *testing.T, addr string) netip.AddrPort {
	t.Helper()
	socket := func() int {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	l := socket()
	if err := unix.Bind(l, &unix.SockaddrInet4{Addr: netip.MustParseAddr(addr).As4()}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(l, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(l)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		unix.Connect(socket(), sa)
	}
	return AddrPort(sa)
}

// Who waits for the pod's workload when the pod ends has been drained.
func TestEndWhileUnknown(t *testing.T) {
	w := newWorld(t)
	stranger := w.pod("stranger")
	w.capture(t, vip, stranger, PortOutbound)
	w.capture(t, "127.0.1.3:15008", stranger, PortInbound)
	w.capture(t, "127.0.1.3:80", stranger, PortInboundPassthrough)
	var conns []*net.TCPConn
	for _, addr := range []string{vip, "127.0.1.3:15008", "127.0.1.3:80"} {
		conns = append(conns, dial(t, addr))
	}
	time.Sleep(50 * time.Millisecond)
	stranger.Close()
	for _, c := range conns {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%v: %v, want a reset", c.RemoteAddr(), err)
		}
		w.said.with(t, "connection failed", "dst.addr="+c.RemoteAddr().String(), `error="connection closed due to connection drain"`)
	}
}

// Who comes from another network has an address that is somebody else's here: what
// counts is what it says of itself.
func TestSourceOnAnotherNetwork(t *testing.T) {
	w := newWorld(t)
	w.tunnels(t)
	w.echo(t)
	c := w.tunnel(t, dial(t, serverIP+":15008"))
	for network, name := range map[string]string{"": "node", "far": "web"} {
		fields := hbone.RequestHeaders("service.name=web", "", hbone.NewTraceparent(), network)
		s, _, err := c.Open(t.Context(), serverIP+":8080", fields)
		if err != nil {
			t.Fatal(err)
		}
		talk(t, s)
		s.Close()
		w.said.with(t, "connection complete", "src.workload="+name)
	}
}

// The line of a failed handshake says what failed, once.
func TestHandshakeLine(t *testing.T) {
	w := newWorld(t)
	w.capture(t, serverIP+":15008", w.server, PortInbound)
	c := dial(t, serverIP+":15008")
	fmt.Fprint(c, "GET / HTTP/1.1\r\n\r\n")
	line := w.said.with(t, "connection failed", "direction=inbound")
	if !strings.Contains(line, `error="tls handshake error: tls: `) {
		t.Error(line)
	}
}

// A crowd that connects and says nothing has its limit, and leaves no trace.
func TestCrowdOfHandshakes(t *testing.T) {
	w := newWorld(t)
	w.tunnels(t)
	w.echo(t)
	crowd := make([]*net.TCPConn, mostHandshakes)
	for i := range crowd {
		crowd[i] = dial(t, serverIP+":15008")
	}
	waitFor(t, "a crowd", func() bool { return w.server.handshakes.Load() == mostHandshakes })
	late, err := net.Dial("tcp", serverIP+":15008") // which may be told so at once
	if err == nil {
		defer late.Close()
		_, err = late.Read(make([]byte, 1))
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("one too many: %v", err)
	}
	w.said.with(t, "too many handshakes")
	for _, c := range crowd {
		c.Close()
	}
	waitFor(t, "their leaving", func() bool { return w.server.handshakes.Load() == 0 })
	talk(t, dial(t, vip))
}

// Why there is no connection onward is not always that somebody refused it.
func TestConnectError(t *testing.T) {
	for _, tt := range []struct{ err, want error }{{errEnding, errDrained}, {errDrained, errDrained}, {errPolicyChange, errPolicyChange}} {
		for _, outbound := range []bool{false, true} {
			if got := (&line{outbound: outbound}).connectError(tt.err); got != tt.want {
				t.Errorf("%v is told as %v", tt.err, got)
			}
		}
	}
}
