package inpod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/handoff"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/testmain"
	"ambient-emulator/internal/uds"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { testmain.Run(m) }

// ztunnel is a running receiver.
type ztunnel struct {
	t      *testing.T
	path   string
	pods   *Pods
	server *Server
	ready  atomic.Int32
	stop   func()

	mu   sync.Mutex
	done []Handoff
}

func start(t *testing.T) *ztunnel { return startWith(t, listenTCP) }

func startWith(t *testing.T, open socketFactory) *ztunnel {
	t.Helper()
	z := &ztunnel{t: t, path: filepath.Join(t.TempDir(), "zt.sock")}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	var err error
	if z.pods, err = NewPods(log); err != nil {
		t.Fatal(err)
	}
	z.pods.engine.open = open
	l, err := uds.Listen("unix", z.path)
	if err != nil {
		t.Fatal(err)
	}
	z.server = &Server{
		Pods:  z.pods,
		Log:   log,
		Ready: func() { z.ready.Add(1) },
		Report: func(h Handoff) {
			z.mu.Lock()
			z.done = append(z.done, h)
			z.mu.Unlock()
		},
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- z.server.Serve(ctx, l) }()
	z.stop = sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-served, l.Close(), z.pods.Close()); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	t.Cleanup(z.stop)
	return z
}

func (z *ztunnel) dial() *net.UnixConn {
	z.t.Helper()
	conn, _, err := uds.Dial(context.Background(), "unix", z.path)
	if err != nil {
		z.t.Fatal(err)
	}
	z.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

// hand hands over a namespace and returns the answer.
func (z *ztunnel) hand(fd int) error {
	conn, _, err := uds.Dial(context.Background(), "unix", z.path)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if err := handoff.Send(conn, fd); err != nil {
		return err
	}
	return handoff.ReadReply(conn)
}

// ask connects to a port inside a pod and returns what it says.
func ask(pod *netns.NS, port uint16) (string, error) {
	var conn net.Conn
	if _, err := pod.Do(func() (err error) {
		conn, err = net.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String())
		return err
	}); err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	b, err := io.ReadAll(conn)
	return string(b), err
}

// checkServed asks all three ports, and one that nobody serves.
func checkServed(t *testing.T, pod *netns.NS) {
	t.Helper()
	for _, port := range Ports {
		if got, err := ask(pod, port); got != Answer || err != nil {
			t.Errorf("%v port %d: %q, %v", pod.ID(), port, got, err)
		}
	}
	if _, err := ask(pod, 15002); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("%v port 15002: %v, want refused", pod.ID(), err)
	}
}

func TestHandoff(t *testing.T) {
	z := start(t)
	pod := netnstest.New(t)
	if err := z.hand(pod.FD()); err != nil {
		t.Fatal(err)
	}
	checkServed(t, pod)
	h := z.report(0)
	for _, fd := range h.Added.FDs {
		if proto, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); proto != unix.IPPROTO_TCP || err != nil {
			t.Errorf("a listener of protocol %d (%v), want plain TCP", proto, err)
		}
	}
	for _, fd := range append(h.Added.FDs, h.Added.NetNSFD) {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); flags&unix.FD_CLOEXEC == 0 || err != nil {
			t.Errorf("fd %d is not close-on-exec: %#x, %v", fd, flags, err)
		}
	}
	for _, port := range Ports {
		if _, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("port %d on the node: %v, want refused", port, err)
		}
	}
	// Again: success, and nothing changes.
	if err := z.hand(pod.FD()); err != nil {
		t.Fatal(err)
	}
	if n, h := z.ready.Load(), z.report(1); n != 1 || h.Added.New {
		t.Errorf("ready %d times, the second time %+v", n, h)
	}
	z.stop()
	if _, err := ask(pod, PortInbound); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("after the end: %v, want refused", err)
	}
}

// A pod costs four descriptors: three listeners and the namespace.
func TestDescriptorsOfAPod(t *testing.T) {
	z := start(t)
	if err := z.hand(netnstest.New(t).FD()); err != nil { // the first opens what is opened once
		t.Fatal(err)
	}
	z.report(0)
	pod := netnstest.New(t)
	before := len(testmain.Descriptors())
	for i := range 3 {
		if err := z.hand(pod.FD()); err != nil {
			t.Fatal(err)
		}
		z.report(1 + i)
		if more := len(testmain.Descriptors()) - before; more != 4 {
			t.Errorf("%d descriptors more, want 4", more)
		}
	}
}

// What the seed's listeners accept is fit to be relayed, where it is: nothing waits
// for an ACK, and a peer that has gone is noticed.
func TestAcceptedInheritsOptions(t *testing.T) {
	ns := netnstest.New(t)
	m, err := listen(ns.Do, Addrs(), listenTCP, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(m.sockets)
	for _, s := range m.sockets {
		if err := unix.Connect(clientIn(t, ns), &unix.SockaddrInet4{Port: int(s.port), Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			t.Fatal(err)
		}
		acceptAll(s.fd, func(fd int) {
			defer unix.Close(fd)
			for name, o := range map[string][2]int{"TCP_NODELAY": {unix.IPPROTO_TCP, unix.TCP_NODELAY}, "SO_KEEPALIVE": {unix.SOL_SOCKET, unix.SO_KEEPALIVE}} {
				if v, err := unix.GetsockoptInt(fd, o[0], o[1]); (v != 0) != (s.port != PortInbound) || err != nil {
					t.Errorf("%d: %s is %d, %v", s.port, name, v, err)
				}
			}
		})
	}
}

// Many handoffs of one namespace at once are one start and many successes.
func TestOneNamespaceManySenders(t *testing.T) {
	z := start(t)
	pod := netnstest.New(t)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			if err := z.hand(pod.FD()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := z.ready.Load(); n != 1 {
		t.Errorf("ready %d times", n)
	}
	checkServed(t, pod)
}

// A thousand pods in one process, handed over at once, while everybody else in
// the process is always at home.
func TestThousandPods(t *testing.T) {
	const n = 1000
	z := start(t)
	home, err := netns.Home()
	if err != nil {
		t.Fatal(err)
	}
	pods := make([]*netns.NS, n)
	for i := range pods {
		pods[i] = netnstest.New(t)
	}
	stop := make(chan struct{})
	var bystanders, senders sync.WaitGroup
	for range 3 {
		bystanders.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if got, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || got != home.ID().String() {
					t.Errorf("a bystander found itself in %s (%v)", got, err)
					return
				}
				runtime.Gosched()
			}
		})
	}
	for _, pod := range pods {
		senders.Go(func() {
			if err := z.hand(pod.FD()); err != nil {
				t.Error(err)
			}
		})
	}
	senders.Wait()
	close(stop)
	bystanders.Wait()
	if astray := testmain.ThreadsAstray(); len(astray) > 0 {
		t.Errorf("threads left in a pod: %v", astray)
	}
	if got := z.pods.Len(); got != n || z.ready.Load() != n {
		t.Errorf("%d pods, ready %d times", got, z.ready.Load())
	}
	for i := 0; i < n; i += 100 {
		checkServed(t, pods[i])
	}
}

// What is refused is refused by name, costs no descriptor, and does not stop
// the next good handoff.
func TestRefusals(t *testing.T) {
	home, err := netns.Home()
	if err != nil {
		t.Fatal(err)
	}
	good := netnstest.New(t)
	file := openFile(t, filepath.Join(t.TempDir(), "file"))
	mnt := openFile(t, "/proc/self/ns/mnt")
	for _, tt := range []struct {
		name string
		b    string
		fds  []int
		want string
	}{
		{"a regular file", "\x01", []int{file}, "not a network namespace but a regular file"},
		{"a mount namespace", "\x01", []int{mnt}, "another type: mnt"},
		{"ztunnel's own", "\x01", []int{home.FD()}, "own network namespace"},
		{"no descriptor", "\x01", nil, "no descriptor"},
		{"two descriptors", "\x01", []int{good.FD(), good.FD()}, "more than one descriptor"},
		{"three descriptors", "\x01", []int{good.FD(), good.FD(), good.FD()}, "more than one descriptor"},
		{"wrong byte", "\x7f", []int{good.FD()}, "starts with 0x7f"},
		{"long message", "\x01\x00\x00", []int{good.FD()}, "starts with"},
		{"nothing", "", nil, "closed without a message"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			z := start(t)
			if err := z.hand(netnstest.New(t).FD()); err != nil {
				t.Fatal(err)
			}
			z.report(0)
			before := testmain.Descriptors()
			conn := z.dial()
			if tt.b != "" {
				var oob []byte
				if len(tt.fds) > 0 {
					oob = unix.UnixRights(tt.fds...)
				}
				if _, _, err := conn.WriteMsgUnix([]byte(tt.b), oob, nil); err != nil {
					t.Fatal(err)
				}
			} else if err := conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			var refused *handoff.RefusedError
			if err := handoff.ReadReply(conn); !errors.As(err, &refused) || !strings.Contains(refused.Reason, tt.want) {
				t.Errorf("the peer is told %v, want %q", err, tt.want)
			}
			conn.Close()
			h := z.report(1)
			if h.Err == nil || !strings.Contains(h.Err.Error(), tt.want) || int(h.Peer.PID) != os.Getpid() {
				t.Errorf("reported: %+v", h)
			}
			if after := testmain.Descriptors(); len(after) != len(before) {
				t.Errorf("descriptors before: %q\nafter: %q", before, after)
			}
			next := netnstest.New(t)
			if err := z.hand(next.FD()); err != nil {
				t.Errorf("the next handoff: %v", err)
			}
			checkServed(t, next)
		})
	}
}

// report waits for the i-th report.
func (z *ztunnel) report(i int) (h Handoff) {
	z.t.Helper()
	waitFor(z.t, "a report", func() bool {
		z.mu.Lock()
		defer z.mu.Unlock()
		if len(z.done) <= i {
			return false
		}
		h = z.done[i]
		return true
	})
	return h
}

// The seed's sender closes without reading the reply; the pod is served.
func TestSeedsSender(t *testing.T) {
	z := start(t)
	pod := netnstest.New(t)
	conn := z.dial()
	if err := fdpass.Send(conn, []byte{1}, pod.FD()); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	waitFor(t, "the pod", func() bool { return z.ready.Load() == 1 })
	checkServed(t, pod)
}

func TestAllOrNothing(t *testing.T) {
	z := start(t)
	if err := z.hand(netnstest.New(t).FD()); err != nil { // what is opened once is open then
		t.Fatal(err)
	}
	z.report(0)
	pod := netnstest.New(t)
	var squatter net.Listener
	if _, err := pod.Do(func() (err error) {
		squatter, err = net.Listen("tcp", "127.0.0.1:15006")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	before := testmain.Descriptors()
	err := z.hand(pod.FD())
	var refused *handoff.RefusedError
	if !errors.As(err, &refused) || !strings.Contains(refused.Reason, "listen on 127.0.0.1:15006: bind: address already in use") {
		t.Errorf("got %v", err)
	}
	z.report(1)
	if after := testmain.Descriptors(); len(after) != len(before) {
		t.Errorf("descriptors before: %q\nafter: %q", before, after)
	}
	if _, err := ask(pod, PortInbound); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("15008 after the refusal: %v, want refused", err)
	}
	if z.ready.Load() != 1 || z.pods.Len() != 1 {
		t.Errorf("ready %d times, %d pods", z.ready.Load(), z.pods.Len())
	}
	squatter.Close()
	if err := z.hand(pod.FD()); err != nil {
		t.Errorf("when the port is free: %v", err)
	}
	checkServed(t, pod)
}

func TestLoopbackDown(t *testing.T) {
	z := start(t)
	pod := netnstest.NewLoDown(t)
	if err := z.hand(pod.FD()); err != nil {
		t.Fatal(err)
	}
	if h := z.report(0); !h.Added.LoopDown || !strings.Contains(LoopDownWarning(h.NetNS, h.Added.NetNSFD), fmt.Sprintf("nsenter --net=/proc/%d/fd/%d ip link set lo up", os.Getpid(), h.Added.NetNSFD)) {
		t.Errorf("lo is down, and reported: %+v", h)
	}
	if err := z.hand(netnstest.New(t).FD()); err != nil {
		t.Fatal(err)
	}
	if h := z.report(1); h.Added.LoopDown {
		t.Errorf("lo is up, and reported: %+v", h)
	}
}

// A thread that could not come back is destroyed; the sender is refused, what
// was bound is closed, and the next handoff works. The kernel itself refuses the
// way back: the last bind drops the thread's CAP_SYS_ADMIN.
func TestStrandedHandoff(t *testing.T) {
	var harmless atomic.Bool
	z := startWith(t, func(addr netip.AddrPort) (int, error) {
		fd, err := listenTCP(addr)
		if addr.Port() == PortOutbound && !harmless.Load() {
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var none [2]unix.CapUserData
			err = errors.Join(err, unix.Capset(&hdr, &none[0]))
		}
		return fd, err
	})
	pod := netnstest.New(t)
	err := z.hand(pod.FD())
	if err == nil || !strings.Contains(err.Error(), "could not come back and was destroyed") {
		t.Fatalf("got %v", err)
	}
	h := z.report(0)
	waitFor(t, "the thread's end", func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", h.Added.Visit.TID))
		return errors.Is(err, os.ErrNotExist)
	})
	if _, err := ask(pod, PortInbound); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("what was bound: %v, want refused", err)
	}
	harmless.Store(true)
	if err := z.hand(pod.FD()); err != nil {
		t.Fatalf("the next handoff: %v", err)
	}
	checkServed(t, pod)
}

func openFile(t *testing.T, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		if fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within 10 s", what)
		}
	}
}
