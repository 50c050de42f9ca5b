package inpod

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/fdpass"
	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/fresh"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/zds"
	"ambient-emulator/ztunnel-emulator/internal/proxy"
)

var defaults = SocketConfig{IPv6: true, Mark: DefaultMark, PortReuse: true, DNS: true, KeepAlive: proxy.DefaultKeepAlive()}

var quiet = slog.New(slog.DiscardHandler)

var proxyDefaults = &proxy.Config{Mark: DefaultMark, KeepAlive: proxy.DefaultKeepAlive(), Log: quiet}

// machine is a Workloads without an agent.
type machine struct {
	*Workloads
	t *testing.T
}

func newMachine(t *testing.T) machine {
	t.Helper()
	w, err := NewWorkloads(defaults, proxyDefaults, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(0); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return machine{w, t}
}

func (m machine) add(uid string, ns *netns.NS) error {
	return m.Handle(zds.Add(uid, "pod-"+uid, "default", "sa"), netnstest.DupFD(m.t, ns))
}
func (m machine) keep(uid string) error { return m.Handle(zds.Keep(uid), fdpass.NoFD) }
func (m machine) del(uid string) error  { return m.Handle(zds.Del(uid), fdpass.NoFD) }
func (m machine) snap() error           { return m.Handle(zds.Snapshot(), fdpass.NoFD) }

// must fails the test if one of the steps was nacked.
func (m machine) must(errs ...error) {
	m.t.Helper()
	for i, err := range errs {
		if err != nil {
			m.t.Fatalf("step %d: %v", i+1, err)
		}
	}
}

func (m machine) want(active, pending, started, stopped int, ready bool) {
	m.t.Helper()
	if got, want := m.Counts(), (Counts{active, pending, started, stopped}); got != want || m.Ready() != ready {
		m.t.Errorf("%+v, ready %v; want %+v, ready %v", got, m.Ready(), want, ready)
	}
}

// listening tells whether the pod has listeners of ours, by connecting to one.
func listening(pod *netns.NS) bool {
	got, err := ask(pod, PortInbound)
	return err == nil && got == Answer
}

// occupy takes a port in a pod without sharing it.
func occupy(t *testing.T, pod *netns.NS, port uint16) net.Listener {
	t.Helper()
	var l net.Listener
	if _, err := pod.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(netip.IPv6Unspecified(), port).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func TestAddStartsAProxy(t *testing.T) {
	m, pod := newMachine(t), netnstest.New(t)
	m.must(m.add("u1", pod))
	m.want(1, 0, 1, 0, false)
	m.must(m.snap())
	m.want(1, 0, 1, 0, true)
	checkServedByZDS(t, pod)
}

// checkServedByZDS asks all three ports. What comes to the last two without having
// been redirected would be a loop, and is closed.
func checkServedByZDS(t *testing.T, pod *netns.NS) {
	t.Helper()
	for _, port := range Ports {
		want := ""
		if port == PortInbound {
			want = Answer
		}
		if got, err := ask(pod, port); got != want || err != nil {
			t.Errorf("%v port %d: %q, %v", pod.ID(), port, got, err)
		}
	}
}

func TestAddTwiceStartsOnlyOne(t *testing.T) {
	m, pod := newMachine(t), netnstest.New(t)
	m.must(m.add("u1", pod), m.add("u1", pod), m.snap(), m.add("u1", pod))
	m.want(1, 0, 1, 0, true)
}

// 15008 is occupied: nack and pending; when it is free, a retry succeeds.
func TestFailedAddIsRetried(t *testing.T) {
	m, pod := newMachine(t), netnstest.New(t)
	squatter := occupy(t, pod, PortInbound)
	m.must(m.snap())
	err := m.add("u1", pod)
	var start *StartError
	if !errors.As(err, &start) || !errors.Is(err, unix.EADDRINUSE) {
		t.Fatalf("got %v", err)
	}
	m.want(0, 1, 0, 0, false)
	m.Retry()
	m.want(0, 1, 0, 0, false)
	squatter.Close()
	m.Retry()
	m.want(1, 0, 1, 0, true)
	if !listening(pod) {
		t.Error("not served")
	}
}

// A ready ztunnel with a new pending pod is not ready, and the same pod where it
// already runs takes it off the pending.
func TestSameNamespaceClearsPending(t *testing.T) {
	m, good, bad := newMachine(t), netnstest.New(t), netnstest.New(t)
	occupy(t, bad, PortInbound)
	m.must(m.snap(), m.add("u1", good))
	m.want(1, 0, 1, 0, true)
	if m.add("u2", bad) == nil {
		t.Fatal("it started")
	}
	m.want(1, 1, 1, 0, false)
	m.must(m.add("u2", good)) // shares the ports with u1
	m.want(2, 0, 2, 0, true)
	m.must(m.add("u2", good))
	m.want(2, 0, 2, 0, true)
}

// An add brings a pod back whose listener somebody has destroyed.
func TestBrokenPodIsMadeAnew(t *testing.T) {
	m, pod := newMachine(t), netnstest.New(t)
	m.must(m.snap(), m.add("u1", pod))
	m.Workloads.running["u1"].broken.Store(true)
	m.must(m.add("u1", pod))
	m.want(1, 0, 2, 1, true)
	if !listening(pod) {
		t.Error("not served")
	}
}

// What is no namespace ends the pod that ran: it is another one than before.
func TestNoNamespaceReplaces(t *testing.T) {
	m, pod := newMachine(t), netnstest.New(t)
	m.must(m.snap(), m.add("u1", pod))
	dup, err := unix.Dup(openFile(t, t.TempDir()+"/file"))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Handle(zds.Add("u1", "n", "d", "s"), dup); !errors.Is(err, netns.ErrNotNetNS) {
		t.Errorf("got %v", err)
	}
	m.want(0, 1, 1, 1, false)
}

// A pending pod that is added in another namespace starts there, and the retry
// does not disturb it.
func TestAddWhilePending(t *testing.T) {
	m, bad, good := newMachine(t), netnstest.New(t), netnstest.New(t)
	occupy(t, bad, PortInbound)
	m.must(m.snap())
	if m.add("u1", bad) == nil {
		t.Fatal("it started")
	}
	m.must(m.add("u1", good))
	m.want(1, 0, 1, 0, true)
	m.Retry()
	m.want(1, 0, 1, 0, true)
}

func TestPendingIsDeleted(t *testing.T) {
	m, bad := newMachine(t), netnstest.New(t)
	occupy(t, bad, PortInbound)
	m.must(m.snap())
	if m.add("u1", bad) == nil {
		t.Fatal("it started")
	}
	m.must(m.del("u1"))
	m.want(0, 0, 0, 0, true)
}

func TestDelBeforeSnapshotEmptiesBoth(t *testing.T) {
	m, bad := newMachine(t), netnstest.New(t)
	occupy(t, bad, PortInbound)
	if m.add("u1", bad) == nil {
		t.Fatal("it started")
	}
	m.must(m.keep("u2"), m.del("u1"), m.del("u2"))
	if len(m.Workloads.snapshot) != 0 {
		t.Errorf("named: %v", m.Workloads.snapshot)
	}
	m.must(m.snap())
	m.want(0, 0, 0, 0, true)
}

// Before the snapshot a delete leaves a running pod to the reconciliation.
func TestDelBeforeSnapshotLeavesRunning(t *testing.T) {
	m, pod := newMachine(t), netnstest.New(t)
	m.must(m.add("u1", pod), m.snap())
	m.NewConnection()
	m.must(m.del("u1"))
	m.want(1, 0, 1, 0, false)
	m.must(m.snap())
	m.want(0, 0, 1, 1, true)
}

func TestAddDelAdd(t *testing.T) {
	m, pod := newMachine(t), netnstest.New(t)
	m.must(m.snap(), m.add("u1", pod), m.del("u1"))
	if listening(pod) {
		t.Error("served after the delete")
	}
	m.must(m.add("u1", pod))
	m.want(1, 0, 2, 1, true)
	if !listening(pod) {
		t.Error("not served again")
	}
	m.must(m.del("unknown"))
}

// A new connection keeps what runs, if the agent names it again in either way.
func TestNewConnection(t *testing.T) {
	m := newMachine(t)
	kept, added, forgotten, bad := netnstest.New(t), netnstest.New(t), netnstest.New(t), netnstest.New(t)
	occupy(t, bad, PortInbound)
	m.must(m.add("kept", kept), m.add("added", added), m.add("forgotten", forgotten), m.snap())
	if m.add("bad", bad) == nil {
		t.Fatal("it started")
	}
	m.want(3, 1, 3, 0, false)

	m.NewConnection()
	m.want(3, 0, 3, 0, false)
	if !listening(forgotten) {
		t.Error("a disconnected ztunnel has stopped a pod")
	}
	m.must(m.keep("kept"), m.keep("never heard of"), m.add("added", added), m.snap())
	m.want(2, 0, 3, 1, true)
	if !listening(kept) || !listening(added) || listening(forgotten) {
		t.Errorf("kept %v, added %v, forgotten %v", listening(kept), listening(added), listening(forgotten))
	}
}

func TestAddWithAnotherNamespaceReplaces(t *testing.T) {
	m, one, two := newMachine(t), netnstest.New(t), netnstest.New(t)
	m.must(m.snap(), m.add("u1", one), m.add("u1", two))
	m.want(1, 0, 2, 1, true)
	if listening(one) || !listening(two) {
		t.Errorf("old %v, new %v", listening(one), listening(two))
	}
}

// A replacement that fails has ended the old one all the same.
func TestFailedReplacement(t *testing.T) {
	m, one, two := newMachine(t), netnstest.New(t), netnstest.New(t)
	occupy(t, two, PortOutbound)
	m.must(m.snap(), m.add("u1", one))
	if m.add("u1", two) == nil {
		t.Fatal("it started")
	}
	m.want(0, 1, 1, 1, false)
	if listening(one) {
		t.Error("the old one is still served")
	}
}

func TestProtocolErrors(t *testing.T) {
	pod := netnstest.New(t)
	noInfo := &zds.WorkloadRequest{Payload: &zds.WorkloadRequest_Add{Add: &zds.AddWorkload{Uid: "u1"}}}
	for _, tt := range []struct {
		name string
		do   func(m machine) error
		want string
	}{
		{"add without info", func(m machine) error { return m.Handle(noInfo, netnstest.DupFD(t, pod)) }, `ProtocolError("workload_info is required but not present")`},
		{"keep after snapshot", func(m machine) error { m.must(m.snap()); return m.keep("u1") }, `ProtocolError("pod keep received after snapshot")`},
		{"second snapshot", func(m machine) error { m.must(m.snap()); return m.snap() }, `ProtocolError("pod snapshot received already")`},
	} {
		m := newMachine(t)
		err := tt.do(m)
		var fatal *ProtocolError
		if !errors.As(err, &fatal) || err.Error() != tt.want {
			t.Errorf("%s: %v, want %s", tt.name, err, tt.want)
		}
	}
}

// What is no namespace, and ztunnel's own, are pending for ever, or until the
// agent thinks better of it; no descriptor of them is kept.
func TestAddOfNoNamespace(t *testing.T) {
	home, err := netns.Home()
	if err != nil {
		t.Fatal(err)
	}
	m := newMachine(t)
	m.must(m.snap())
	file := openFile(t, t.TempDir()+"/file")
	dup, err := unix.Dup(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Handle(zds.Add("u1", "n", "d", "s"), dup); !errors.Is(err, netns.ErrNotNetNS) {
		t.Errorf("a file: %v", err)
	}
	if err := m.add("u2", home); !errors.Is(err, ErrOwnNetNS) {
		t.Errorf("own namespace: %v", err)
	}
	m.want(0, 2, 0, 0, false)
	m.Retry()
	m.want(0, 2, 0, 0, false)
	m.must(m.del("u1"), m.add("u2", netnstest.New(t)))
	m.want(1, 0, 1, 0, true)
}

// After a delete nothing of ours keeps the namespace: the kernel frees it, and
// with it one end of a veth pair, and so the other end, too.
func TestDeletedNamespaceIsFreed(t *testing.T) {
	m := newMachine(t)
	m.must(m.snap())
	ns, err := fresh.Make()
	if err != nil {
		t.Fatal(err)
	}
	netnstest.Veth(t, ns, "canary")
	m.must(m.add("u1", ns))
	ns.Close()
	if _, err := net.InterfaceByName("canary"); err != nil {
		t.Fatalf("too early: %v", err)
	}
	m.must(m.del("u1"))
	waitFor(t, "end of the namespace", func() bool {
		_, err := net.InterfaceByName("canary")
		return err != nil
	})
}

// The options of a listener, by the sheet.
func TestSocketOptions(t *testing.T) {
	no, yes := false, true
	for _, tt := range []struct {
		name                        string
		c                           SocketConfig
		family, mark, reuse, transp int
	}{
		{"defaults", defaults, unix.AF_INET6, 0x539, 1, 1},
		{"IPv4", SocketConfig{Mark: 7, PortReuse: true}, unix.AF_INET, 7, 1, 1},
		{"nothing", SocketConfig{OrigSrc: &no}, unix.AF_INET, 0, 0, 0},
		{"insisting", SocketConfig{IPv6: true, OrigSrc: &yes}, unix.AF_INET6, 0, 0, 1},
	} {
		pod := netnstest.New(t)
		if _, err := pod.Do(func() error { return os.WriteFile("/proc/sys/net/ipv6/bindv6only", []byte("1"), 0) }); err != nil {
			t.Fatal(err)
		}
		m, err := listen(pod.Do, tt.c.Addrs(), tt.c.factory(slog.Default()), nil)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		for _, s := range m.sockets {
			fd := s.fd
			get := func(level, opt int) int {
				v, err := unix.GetsockoptInt(fd, level, opt)
				if err != nil {
					t.Errorf("%s: option %d: %v", tt.name, opt, err)
				}
				return v
			}
			if tt.family == unix.AF_INET6 && get(unix.SOL_IPV6, unix.IPV6_V6ONLY) != 0 {
				t.Errorf("%s: takes IPv6 only", tt.name)
			}
			if got := get(unix.SOL_SOCKET, unix.SO_DOMAIN); got != tt.family {
				t.Errorf("%s: family %d", tt.name, got)
			}
			if got := get(unix.SOL_SOCKET, unix.SO_MARK); got != tt.mark {
				t.Errorf("%s: mark %#x", tt.name, got)
			}
			if got := get(unix.SOL_SOCKET, unix.SO_REUSEPORT); got != tt.reuse {
				t.Errorf("%s: SO_REUSEPORT %d", tt.name, got)
			}
			if got := get(unix.SOL_IP, unix.IP_TRANSPARENT); got != tt.transp {
				t.Errorf("%s: IP_TRANSPARENT %d", tt.name, got)
			}
			if got := get(unix.SOL_SOCKET, unix.SO_PROTOCOL); got != unix.IPPROTO_TCP {
				t.Errorf("%s: protocol %d, want plain TCP", tt.name, got)
			}
		}
		closeAll(m.sockets)
	}
}

// ENABLE_ORIG_SRC=true fails the pod where a transparent socket may not be made;
// unset, the pod goes without.
func TestOrigSrcInsists(t *testing.T) {
	yes := true
	for _, tt := range []struct {
		name string
		c    SocketConfig
		want error
	}{
		{"unset", SocketConfig{}, nil},
		{"true", SocketConfig{OrigSrc: &yes}, unix.EPERM},
	} {
		pod := netnstest.New(t)
		open := tt.c.factory(slog.Default())
		var fd int
		_, err := pod.Do(func() (err error) {
			// CAP_NET_ADMIN and CAP_NET_RAW belong to the thread, which ends with
			// this: it may not come back either.
			if err := dropAll(); err != nil {
				return err
			}
			fd, err = open(tt.c.Addrs()[0])
			return err
		})
		if tt.want == nil {
			unix.Close(fd)
			if errors.Is(err, unix.EPERM) && !errors.Is(err, netns.ErrStranded) {
				t.Errorf("%s: %v", tt.name, err)
			}
			continue
		}
		if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), "ENABLE_ORIG_SRC=true insists") {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func dropAll() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	return unix.Capset(&hdr, &none[0])
}
