package inpod

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/uds"
)

// gate is a socket factory that waits until it is opened.
type gate struct {
	entered, open chan struct{}
}

func newGate() *gate { return &gate{make(chan struct{}, len(Ports)), make(chan struct{})} }

func (g *gate) listen(addr netip.AddrPort) (int, error) {
	g.entered <- struct{}{}
	<-g.open
	return listenTCP(addr)
}

// Who adds a pod that is being started waits for the start, and so does Close.
func TestEverybodyWaitsForAStart(t *testing.T) {
	g := newGate()
	p, err := NewPods(slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	p.engine.open = g.listen
	pod := netnstest.New(t)
	type result struct {
		added Added
		err   error
	}
	first, second, closed := make(chan result, 1), make(chan result, 1), make(chan error, 1)
	add := func(to chan result) {
		added, err := p.Add(netnstest.Dup(t, pod))
		to <- result{added, err}
	}
	go add(first)
	<-g.entered
	go add(second)
	go func() { closed <- p.Close() }()
	select {
	case r := <-second:
		// It may also have come after Close.
		if r.err != ErrStopping {
			t.Errorf("the second add did not wait: %+v", r)
		}
		second <- result{added: Added{}}
	case err := <-closed:
		t.Errorf("close did not wait: %v", err)
		closed <- err
	case <-time.After(100 * time.Millisecond):
	}
	close(g.open)
	if r := <-first; r.err != nil || !r.added.New {
		t.Errorf("first: %+v", r)
	}
	if r := <-second; r.err != nil || r.added.New {
		t.Errorf("second: %+v", r)
	}
	if err := <-closed; err != nil {
		t.Errorf("close: %v", err)
	}
}

// "listeners ready" is said before the sender is told, so that who has been told
// finds it said.
func TestReadyBeforeReply(t *testing.T) {
	z := start(t)
	for i := range 50 {
		if err := z.hand(netnstest.New(t).FD()); err != nil {
			t.Fatal(err)
		}
		if n := z.ready.Load(); n != int32(i+1) {
			t.Fatalf("told of pod %d, ready said %d times", i+1, n)
		}
	}
}

// What a client has said unread must not turn the end of our answer into a reset.
func TestAnswerIsNotReset(t *testing.T) {
	z := start(t)
	pod := netnstest.New(t)
	if err := z.hand(pod.FD()); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		fd := clientIn(t, pod)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Port: PortInbound, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			t.Fatal(err)
		}
		unix.Write(fd, []byte("GET / HTTP/1.1\r\n\r\n"))
		var got []byte
		buf := make([]byte, 64)
		for {
			n, err := unix.Read(fd, buf)
			if err != nil {
				t.Fatalf("after %q: %v", got, err)
			}
			if n == 0 {
				break
			}
			got = append(got, buf[:n]...)
		}
		if string(got) != Answer {
			t.Errorf("got %q", got)
		}
		unix.Shutdown(fd, unix.SHUT_WR)
	}
}

// A listener that somebody in the pod destroys does not make us spin, and the
// next handoff of the pod brings it back.
func TestDestroyedListener(t *testing.T) {
	z := start(t)
	pod := netnstest.New(t)
	if err := z.hand(pod.FD()); err != nil {
		t.Fatal(err)
	}
	kill := exec.Command("nsenter", "--net=/proc/self/fd/3", "ss", "-K", "-ltn", "sport = :15008")
	kill.ExtraFiles = []*os.File{os.NewFile(uintptr(netnstest.DupFD(t, pod)), "netns")}
	out, err := kill.CombinedOutput()
	kill.ExtraFiles[0].Close()
	if err != nil || !strings.Contains(string(out), "15008") {
		t.Fatalf("ss -K: %v: %s", err, out)
	}
	waitFor(t, "the loss to be noticed", func() bool {
		z.pods.mu.Lock()
		defer z.pods.mu.Unlock()
		return z.pods.pods[pod.ID()].broken()
	})
	if err := z.hand(pod.FD()); err != nil {
		t.Fatal(err)
	}
	if h := z.report(1); !h.Added.New {
		t.Error("the pod was not made anew")
	}
	checkServed(t, pod)
}

// countingHandler counts the warnings of a log.
type countingHandler struct {
	slog.Handler
	warnings atomic.Int32
}

func (c *countingHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		c.warnings.Add(1)
	}
	return nil
}

// With the table full and peers waiting, both accept loops pause between their
// attempts; and a handoff long after that is a good one.
func TestAcceptBacksOff(t *testing.T) {
	counts := &countingHandler{Handler: slog.NewTextHandler(io.Discard, nil)}
	p, err := NewPods(slog.New(counts))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	path := t.TempDir() + "/zt.sock"
	l, err := uds.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	server := &Server{Pods: p, Log: slog.New(counts)}
	go func() { served <- server.Serve(ctx, l) }()
	defer func() { cancel(); <-served }()

	z := &ztunnel{t: t, path: path}
	pod := netnstest.New(t)
	if err := z.hand(pod.FD()); err != nil {
		t.Fatal(err)
	}
	client, peer := clientIn(t, pod), z.dial() // the peer is accepted and silent
	waitFor(t, "accept", func() bool {
		server.peers.mu.Lock()
		defer server.peers.mu.Unlock()
		return len(server.peers.silent) == 1
	})
	release := fillTable(t, 0)
	defer release()
	if err := unix.Connect(client, &unix.SockaddrInet4{Port: PortInbound, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond)
	release()
	// Doubling from 5 ms, each loop has warned six times or so.
	if n := counts.warnings.Load(); n == 0 || n > 30 {
		t.Errorf("%d warnings in 200 ms", n)
	}
	peer.Close()
	for range 3 {
		if err := z.hand(netnstest.New(t).FD()); err != nil {
			t.Errorf("with room again: %v", err)
		}
	}
}
