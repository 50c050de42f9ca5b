package inpod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/uds"
	"ambient-emulator/internal/zds"
)

// node is a running manager, and the agent's end of its socket.
type node struct {
	t         *testing.T
	listener  *uds.Listener
	path      string
	workloads *Workloads
	readiness *Readiness
	done      chan error
	cancel    context.CancelFunc
	running   atomic.Bool
}

func startNode(t *testing.T, withAgent bool) *node {
	t.Helper()
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	w, err := NewWorkloads(defaults, proxyDefaults, log)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, path: filepath.Join(t.TempDir(), "zds.sock"), workloads: w, readiness: new(Readiness), done: make(chan error, 1)}
	if withAgent {
		n.listen()
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	m := &Manager{Path: n.path, Workloads: w, Readiness: n.readiness, Log: log}
	go func() { n.done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if !n.running.Load() {
			<-n.done
		}
		if err := w.Close(0); err != nil {
			t.Errorf("close: %v", err)
		}
		if n.listener != nil {
			n.listener.Close()
		}
	})
	return n
}

func (n *node) listen() {
	n.t.Helper()
	var err error
	if n.listener, err = uds.Listen(zds.Network, n.path); err != nil {
		n.t.Fatal(err)
	}
}

// agent is the agent's end of one connection.
type agent struct {
	*zds.Conn
	t *testing.T
}

// accept waits for ztunnel and its hello.
func (n *node) accept() agent {
	n.t.Helper()
	n.listener.SetDeadline(time.Now().Add(10 * time.Second))
	conn, err := n.listener.AcceptUnix()
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { conn.Close() })
	a := agent{zds.NewConn(conn), n.t}
	a.SetDeadline(time.Now().Add(20 * time.Second))
	if v, err := a.ReadHello(); v != zds.Version_V1 || err != nil {
		n.t.Fatalf("hello %v, %v", v, err)
	}
	return a
}

// say sends a request and returns the nack, or "".
func (a agent) say(req *zds.WorkloadRequest, ns *netns.NS) string {
	a.t.Helper()
	fd := fdpass.NoFD
	if ns != nil {
		fd = ns.FD()
	}
	if err := a.SendRequest(req, fd); err != nil {
		a.t.Fatal(err)
	}
	nack, err := a.ReadResponse()
	if err != nil {
		a.t.Fatal(err)
	}
	return nack
}

func (a agent) add(uid string, ns *netns.NS) string {
	a.t.Helper()
	return a.say(zds.Add(uid, "pod-"+uid, "default", "sa"), ns)
}

// must wants acks.
func (a agent) must(nacks ...string) {
	a.t.Helper()
	for i, nack := range nacks {
		if nack != "" {
			a.t.Fatalf("step %d: %s", i+1, nack)
		}
	}
}

// ready asks as a kubelet does.
func (n *node) ready() (int, string) {
	r := httptest.NewRecorder()
	n.readiness.ServeHTTP(r, httptest.NewRequest(http.MethodGet, "/healthz/ready", nil))
	return r.Code, r.Body.String()
}

func (n *node) wantReady(code int, body string) {
	n.t.Helper()
	if c, b := n.ready(); c != code || b != body {
		n.t.Errorf("readiness %d %q, want %d %q", c, b, code, body)
	}
}

const notReady = "not ready, pending: workload proxy manager\n"

func TestProcessAddAndDel(t *testing.T) {
	n := startNode(t, true)
	a := n.accept()
	pod := netnstest.New(t)
	n.wantReady(500, notReady)
	a.must(a.add("u1", pod))
	n.wantReady(500, notReady)
	a.must(a.say(zds.Snapshot(), nil))
	n.wantReady(200, "ready\n")
	checkServedByZDS(t, pod)
	a.must(a.say(zds.Del("u1"), nil))
	if listening(pod) {
		t.Error("served after the delete")
	}
	n.wantReady(200, "ready\n")
}

func TestReadinessAnswers(t *testing.T) {
	r := new(Readiness)
	r.Block("proxy")
	r.Block("dns proxy")
	for _, tt := range []struct {
		method, path string
		code         int
		body         string
	}{
		{"GET", "/healthz/ready", 500, "not ready, pending: dns proxy, proxy\n"},
		{"POST", "/healthz/ready", 405, ""},
		{"GET", "/", 404, ""},
	} {
		w := httptest.NewRecorder()
		r.ServeHTTP(w, httptest.NewRequest(tt.method, tt.path, nil))
		if w.Code != tt.code || w.Body.String() != tt.body {
			t.Errorf("%s %s: %d %q", tt.method, tt.path, w.Code, w.Body.String())
		}
	}
}

// The agent goes and comes back: pods stay, readiness does not, and a pod that
// the new snapshot omits is removed, and only that.
func TestReconnect(t *testing.T) {
	n := startNode(t, true)
	a := n.accept()
	kept, gone := netnstest.New(t), netnstest.New(t)
	a.must(a.add("kept", kept), a.add("gone", gone), a.say(zds.Snapshot(), nil))
	a.Close()
	b := n.accept()
	n.wantReady(500, notReady)
	if !listening(kept) || !listening(gone) {
		t.Error("pods are not served between connections")
	}
	b.must(b.say(zds.Keep("kept"), nil), b.say(zds.Snapshot(), nil))
	n.wantReady(200, "ready\n")
	if !listening(kept) || listening(gone) {
		t.Errorf("kept %v, gone %v", listening(kept), listening(gone))
	}
}

// A failed start is nacked, the connection stays, and after five seconds the
// start is tried again.
func TestFailedStartIsRetriedByTimer(t *testing.T) {
	t.Parallel()
	n := startNode(t, true)
	a := n.accept()
	pod := netnstest.New(t)
	squatter := occupy(t, pod, PortInbound)
	nack := a.add("u1", pod)
	if !strings.HasPrefix(nack, "failure to start proxy : listen on [::]:15008: bind: address already in use") {
		t.Errorf("nack %q", nack)
	}
	a.must(a.say(zds.Snapshot(), nil))
	n.wantReady(500, notReady)
	squatter.Close()
	waitFor(t, "the retry", func() bool { code, _ := n.ready(); return code == 200 })
	if !listening(pod) {
		t.Error("not served")
	}
}

// What can't be read is nacked, and the connection is made anew.
func TestReadFailures(t *testing.T) {
	pod := netnstest.New(t)
	fd := pod.FD()
	n := startNode(t, true)
	for _, tt := range []struct {
		name string
		b    []byte
		fds  []int
		want string
	}{
		{"add without a descriptor", []byte("\x0a\x04\x0a\x02u1"), nil, "No control message"},
		{"del with one", []byte("\x12\x04\x12\x02u1"), []int{fd}, "Unexpected control message"},
		{"two descriptors", []byte("\x0a\x04\x0a\x02u1"), []int{fd, fd}, "more than one descriptor"},
		{"three descriptors", []byte("\x0a\x04\x0a\x02u1"), []int{fd, fd, fd}, "more than one descriptor"},
		{"no payload", []byte("\x22\x00"), nil, "no payload"},
		{"garbage", []byte("\x0a\xff"), nil, "decode request"},
		{"too long", make([]byte, zds.MaxPacket+1), nil, "longer than the buffer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := n.accept()
			var oob []byte
			if len(tt.fds) > 0 {
				oob = unix.UnixRights(tt.fds...)
			}
			if _, _, err := a.WriteMsgUnix(tt.b, oob, nil); err != nil {
				t.Fatal(err)
			}
			nack, err := a.ReadResponse()
			if err != nil || !strings.HasPrefix(nack, "failure to read message : ") || !strings.Contains(nack, tt.want) {
				t.Errorf("nack %q, %v; want %q", nack, err, tt.want)
			}
			if _, err := a.ReadResponse(); !errors.Is(err, io.EOF) {
				t.Errorf("the connection is not dropped: %v", err)
			}
		})
	}
	a := n.accept()
	a.must(a.add("u1", pod), a.say(zds.Snapshot(), nil))
	n.wantReady(200, "ready\n")
}

// What breaks the protocol is nacked, and then the process ends.
func TestProtocolErrorEnds(t *testing.T) {
	n := startNode(t, true)
	a := n.accept()
	a.must(a.say(zds.Snapshot(), nil))
	if nack := a.say(zds.Snapshot(), nil); nack != `failure to process message : ProtocolError("pod snapshot received already")` {
		t.Errorf("nack %q", nack)
	}
	n.running.Store(true)
	var fatal *ProtocolError
	if err := <-n.done; !errors.As(err, &fatal) {
		t.Errorf("the manager ended with %v", err)
	}
}

// The agent that is not there yet, or accepts and closes, is waited for, and not
// in a tight loop.
func TestAgentComesLate(t *testing.T) {
	n := startNode(t, false)
	time.Sleep(50 * time.Millisecond) // it may try meanwhile
	n.listen()
	for range 3 {
		conn, err := n.listener.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	a := n.accept()
	a.must(a.say(zds.Snapshot(), nil))
	n.wantReady(200, "ready\n")
}

func TestNoTightLoop(t *testing.T) {
	n := startNode(t, true)
	end := time.Now().Add(500 * time.Millisecond)
	accepted := 0
	for {
		n.listener.SetDeadline(end)
		conn, err := n.listener.AcceptUnix()
		if err != nil {
			break
		}
		conn.Close()
		accepted++
	}
	// 5, 10, 20, 40 … ms, give or take a fifth: seven in half a second.
	if accepted < 3 || accepted > 12 {
		t.Errorf("%d connections in half a second", accepted)
	}
}

// A second failure does not put the first one's retry off; and when the agent
// goes, it is dialled again at once.
func TestSecondFailureDoesNotDelayTheRetry(t *testing.T) {
	t.Parallel()
	n := startNode(t, true)
	a := n.accept()
	one, two := netnstest.New(t), netnstest.New(t)
	squatter := occupy(t, one, PortInbound)
	occupy(t, two, PortInbound)
	a.must(a.say(zds.Snapshot(), nil))
	began := time.Now()
	if a.add("u1", one) == "" {
		t.Fatal("it started")
	}
	squatter.Close()
	for time.Since(began) < 6*time.Second && !listening(one) {
		if a.add("u2", two) == "" {
			t.Fatal("it started")
		}
		time.Sleep(500 * time.Millisecond)
	}
	if !listening(one) {
		t.Error("the first pod is starved by the second")
	}
	n.wantReady(500, notReady)
	a.must(a.say(zds.Del("u2"), nil))
	n.wantReady(200, "ready\n")
}

// Connections that run when ztunnel is told to end go on until the deadline, and
// no longer.
func TestDrainWaits(t *testing.T) {
	m, pod := newMachine(t), netnstest.New(t)
	m.must(m.snap(), m.add("u1", pod))
	fd := clientIn(t, pod)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: PortInbound, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the connection", func() bool {
		m.engine.answerer.mu.Lock()
		defer m.engine.answerer.mu.Unlock()
		return len(m.engine.answerer.open) == 1
	})
	done := make(chan time.Duration, 1)
	go func() {
		began := time.Now()
		m.engine.drain(running(m), 300*time.Millisecond)
		done <- time.Since(began)
	}()
	select {
	case took := <-done:
		// The connection lingers for a second, so the deadline was first.
		if took < 200*time.Millisecond {
			t.Errorf("drained in %v with a connection open", took)
		}
	case <-time.After(900 * time.Millisecond):
		t.Error("the deadline has passed, and it still drains")
		<-done
	}
}

// The end does not wait for a silent agent.
func TestCancelWhileConnected(t *testing.T) {
	n := startNode(t, true)
	a := n.accept()
	a.must(a.say(zds.Snapshot(), nil))
	n.cancel()
	if _, err := a.ReadResponse(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v", err)
	}
	n.running.Store(true)
	if err := <-n.done; err != nil {
		t.Error(err)
	}
	n.wantReady(500, notReady) // and never ready again
}

// Two ztunnels share a pod's ports; the older one leaves while clients connect
// without a pause. None is refused or reset.
func TestLeaveLosesNothing(t *testing.T) {
	for _, leaver := range []string{"older", "newer"} {
		t.Run(leaver, func(t *testing.T) {
			older, newer := newMachine(t), newMachine(t)
			older.must(older.snap())
			newer.must(newer.snap())
			var pods []*netns.NS
			for i := range 8 {
				pod := netnstest.New(t)
				uid := fmt.Sprint("u", i)
				older.must(older.add(uid, pod))
				newer.must(newer.add(uid, pod))
				pods = append(pods, pod)
			}
			leaving := older
			if leaver == "newer" {
				leaving = newer
			}

			var stop atomic.Bool
			var served, lost atomic.Int64
			var clients sync.WaitGroup
			for i := range 3 * len(pods) {
				clients.Go(func() {
					for !stop.Load() {
						if got, err := ask(pods[i%len(pods)], PortInbound); got != Answer || err != nil {
							lost.Add(1)
							t.Errorf("%q, %v", got, err)
							return
						}
						served.Add(1)
					}
				})
			}
			waitFor(t, "some connections", func() bool { return served.Load() > 500 })
			leaving.engine.drain(running(leaving), 5*time.Second)
			after := served.Load()
			waitFor(t, "some more", func() bool { return served.Load() > after+500 || lost.Load() > 0 })
			stop.Store(true)
			clients.Wait()
			t.Logf("%d served, %d lost", served.Load(), lost.Load())
		})
	}
}

func running(m machine) (pods []*pod) {
	for _, p := range m.Workloads.running {
		pods = append(pods, p)
	}
	return pods
}
