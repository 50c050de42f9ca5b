package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
)

// What is not TCP or DNS is untouched.
func TestPing(t *testing.T) {
	w := newWorld(t)
	install(t, w.p, Config{Mode: Redirect, DNS: true, IPv6: true})
	for _, f := range []family{v4(), v6()} {
		if err := w.ping(f, addressesOf(f).remote); err != nil {
			t.Errorf("%s: %v", f.name, err)
		}
	}
}

// ping sends one echo request from the pod (icmp(7)) and waits for the reply.
func (w *world) ping(f family, to netip.Addr) error {
	proto, request, reply := unix.IPPROTO_ICMP, byte(8), byte(0)
	if f.twin != "" {
		proto, request, reply = unix.IPPROTO_ICMPV6, 128, 129
	}
	var fd int
	if _, err := w.p.Do(func() (err error) {
		fd, err = unix.Socket(f.af(), unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
		return err
	}); err != nil {
		return err
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	w.must(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	// Type, code, checksum, identifier, sequence; the kernel sums for IPv6.
	sum := ^(uint16(request) << 8)
	if err := unix.Sendto(fd, []byte{request, 0, byte(sum >> 8), byte(sum), 0, 0, 0, 0}, 0, sockaddr(netip.AddrPortFrom(to, 0))); err != nil {
		return err
	}
	buf := make([]byte, 200)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return err
		}
		header := 0
		if f.twin == "" {
			header = 20
		}
		if n > header && buf[header] == reply {
			return nil
		}
	}
}

// A guest behind a masquerade in the pod gets its DNS answers, too: its flow is
// not put apart from itself. (With the real agent's rules the answer is lost.)
func TestMasqueradedGuestHasDNS(t *testing.T) {
	w := newWorld(t)
	c := Config{Mode: Redirect, DNS: true, IPv6: true}
	for _, f := range c.families() {
		w.people(f, c)
	}
	p, err := open(w.p)
	w.must(err)
	defer p.close()
	policy := nftables.ChainPolicyAccept
	table := p.nft.AddTable(tableOf("docker"))
	post := p.nft.AddChain(&nftables.Chain{Name: "postrouting", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource, Policy: &policy})
	p.nft.AddRule(&nftables.Rule{Table: table, Chain: post, Exprs: append(rule{match: []part{oif("eth0")}}.compile(), &expr.Masq{})})
	w.must(p.nft.Flush())
	install(t, w.p, c)
	for _, f := range c.families() {
		a := addressesOf(f)
		got, err := w.ask(w.g, socketOf{kind: unix.SOCK_DGRAM}, netip.AddrPortFrom(a.remote, 53), patience)
		if want := fmt.Sprintf("remote peer=%v", a.pod); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %s", f.name, got, err, want)
		}
	}
}

// ztunnel asks upstream from the port that the application has just used for the
// same server: the two flows are apart.
func TestDNSFromTheSamePort(t *testing.T) {
	w := newWorld(t)
	c := Config{Mode: Redirect, DNS: true, IPv6: true}
	for _, f := range c.families() {
		w.people(f, c)
	}
	install(t, w.p, c)
	for _, f := range c.families() {
		a := addressesOf(f)
		app := socketOf{kind: unix.SOCK_DGRAM, bind: netip.AddrPortFrom(a.pod, 40053)}
		ztunnel := app
		ztunnel.mark = ProxyMark
		for range 2 {
			for want, s := range map[string]socketOf{"15053": app, "remote": ztunnel} {
				got, err := w.ask(w.p, s, netip.AddrPortFrom(a.remote, 53), patience)
				if want := fmt.Sprintf("%s peer=%v", want, a.pod); err != nil || got != want {
					t.Errorf("%s: %q, %v; want %s", f.name, got, err, want)
				}
			}
		}
	}
}

// A connection that was there before is counted, and reset by whoever sends first.
func TestOpenConnections(t *testing.T) {
	for _, mode := range []Mode{Redirect, TProxy} {
		w := newWorld(t)
		c := Config{Mode: mode, IPv6: true}
		type end struct {
			what string
			fd   int
		}
		var ends []end
		for _, f := range c.families() {
			w.people(f, c)
			a := addressesOf(f)
			at := netip.AddrPortFrom
			stream := func(to netip.Addr) socketOf { return socketOf{kind: unix.SOCK_STREAM, bind: at(to, 0)} }
			// One that the pod has made, and one that was made to it; each speaks first
			// on one of two.
			for i, first := range []string{"P", "R"} {
				port := uint16(9100 + i)
				out, far := w.connection(w.p, stream(a.pod), w.r, at(a.remote, port))
				far2, in := w.connection(w.r, stream(a.remote), w.p, at(a.pod, port))
				if first == "P" {
					ends = append(ends, end{f.name + ": the pod, on its own", out}, end{f.name + ": the pod, on R's", in})
				} else {
					ends = append(ends, end{f.name + ": R, on the pod's", far}, end{f.name + ": R, on its own", far2})
				}
			}
		}
		report, err := Install(w.p, c)
		if err != nil || report.Open != 8 {
			t.Errorf("%s: %+v, %v", mode, report, err)
		}
		if report, err := Install(w.p, c); err != nil || report.Open != 0 {
			t.Errorf("%s: again: %+v, %v", mode, report, err)
		}
		for _, e := range ends {
			unix.Write(e.fd, []byte("?"))
			if _, err := unix.Read(e.fd, make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s, %s: %v", mode, e.what, err)
			}
		}
	}
}

// connection makes a connection from one to another, both with patience.
func (w *world) connection(from *netns.NS, s socketOf, to *netns.NS, addr netip.AddrPort) (client, server int) {
	w.t.Helper()
	l, err := socketOf{kind: unix.SOCK_STREAM, bind: addr}.in(to)
	w.must(err)
	defer unix.Close(l)
	w.must(unix.Listen(l, 1))
	client, err = s.in(from)
	w.must(err)
	w.t.Cleanup(func() { unix.Close(client) })
	w.must(unix.Connect(client, sockaddr(addr)))
	server, _, err = unix.Accept4(l, unix.SOCK_CLOEXEC)
	w.must(err)
	w.t.Cleanup(func() { unix.Close(server) })
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	w.must(unix.SetsockoptTimeval(client, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	w.must(unix.SetsockoptTimeval(server, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	return client, server
}

// With no ztunnel a captured pod is closed in both modes, and without our rules
// it is open, but nobody can speak in another's name.
func TestClosedWithoutZtunnel(t *testing.T) {
	for _, mode := range []Mode{Redirect, TProxy} {
		w := newWorld(t)
		stream := socketOf{kind: unix.SOCK_STREAM}
		for _, f := range []family{v4(), v6()} {
			a := addressesOf(f)
			for ns, at := range map[string]netip.Addr{"P": a.pod, "R": a.remote} {
				s := stream
				s.bind = netip.AddrPortFrom(at, appPort)
				w.listen(map[string]*netns.NS{"P": w.p, "R": w.r}[ns], "app", s)
			}
		}
		for _, captured := range []bool{false, true} {
			if captured {
				install(t, w.p, Config{Mode: mode, IPv6: true})
			}
			for _, f := range []family{v4(), v6()} {
				a := addressesOf(f)
				wait := patience
				if captured {
					wait = silence
				}
				if _, err := w.ask(w.r, stream, netip.AddrPortFrom(a.pod, appPort), wait); (err != nil) != captured {
					t.Errorf("%s, %s: inbound, captured %v: %v", mode, f.name, captured, err)
				}
				if _, err := w.ask(w.p, stream, netip.AddrPortFrom(a.remote, appPort), wait); (err != nil) != captured {
					t.Errorf("%s, %s: outbound, captured %v: %v", mode, f.name, captured, err)
				}
				spoof := socketOf{kind: unix.SOCK_STREAM, mark: ProxyMark, transparent: true, bind: netip.AddrPortFrom(a.remote, 0)}
				if captured {
					wait = patience
				} else {
					wait = silence
				}
				if _, err := w.ask(w.p, spoof, netip.AddrPortFrom(a.pod, appPort), wait); (err == nil) != captured {
					t.Errorf("%s, %s: as R, captured %v: %v", mode, f.name, captured, err)
				}
			}
		}
	}
}

// REDIRECT does not reach a listener on loopback, and TPROXY none that is not
// transparent; one on any other address, or none yet, is fine.
func TestListenersOutOfReach(t *testing.T) {
	for _, tt := range []struct {
		bind             string
		transparent      bool
		redirect, tproxy error
	}{
		{"127.0.0.1:15006", true, ErrLoopbackOnly, nil},
		{"127.0.0.1:15006", false, ErrLoopbackOnly, ErrOpaque},
		{"[::1]:15008", true, ErrLoopbackOnly, nil},
		{"[::1]:15008", false, ErrLoopbackOnly, ErrOpaque},
		{"0.0.0.0:15006", true, nil, nil},
		{"0.0.0.0:15006", false, nil, ErrOpaque},
		{"[::]:15008", true, nil, nil},
		{"[::]:15008", false, nil, ErrOpaque},
		{"127.0.0.1:15001", false, nil, nil}, // TPROXY does not lead there
		{"127.0.0.1:8080", false, nil, nil},
	} {
		w := &world{t: t, p: netnstest.New(t)}
		w.listen(w.p, "z", socketOf{kind: unix.SOCK_STREAM, transparent: tt.transparent, bind: netip.MustParseAddrPort(tt.bind)})
		before := state(t, w.p)
		for mode, want := range map[Mode]error{Redirect: tt.redirect, TProxy: tt.tproxy} {
			_, err := Install(w.p, Config{Mode: mode, IPv6: true})
			if !errors.Is(err, want) || (err == nil) != (want == nil) {
				t.Errorf("%s, transparent %v, %s: %v", tt.bind, tt.transparent, mode, err)
			}
			if want == ErrLoopbackOnly && !strings.Contains(fmt.Sprint(err), "tproxy") {
				t.Errorf("%s: %v does not say what to do", tt.bind, err)
			}
			remove(t, w.p)
			same(t, tt.bind+": after", state(t, w.p), before)
		}
	}
	// One that is found is enough.
	w := &world{t: t, p: netnstest.New(t)}
	w.listen(w.p, "a", socketOf{kind: unix.SOCK_STREAM, bind: netip.MustParseAddrPort("[::1]:15006")})
	w.listen(w.p, "b", socketOf{kind: unix.SOCK_STREAM, transparent: true, bind: netip.MustParseAddrPort("127.0.0.1:15006")})
	install(t, w.p, Config{Mode: TProxy, IPv6: true})
	// Guests come by the virtual interface's address, in both modes.
	w.listen(w.p, "c", socketOf{kind: unix.SOCK_STREAM, transparent: true, bind: netip.MustParseAddrPort("127.0.0.1:15001")})
	if _, err := Install(w.p, Config{Mode: TProxy, IPv6: true, VirtualInterfaces: []string{"tap0"}}); !errors.Is(err, ErrGuests) {
		t.Errorf("guests: %v", err)
	}
}

// A connection that one side has ended is open as long as the other may speak.
func TestOpenIsWhatMaySpeak(t *testing.T) {
	w := newWorld(t)
	a := addressesOf(v4())
	stream := socketOf{kind: unix.SOCK_STREAM, bind: netip.AddrPortFrom(a.pod, 0)}
	open := func(want int) {
		t.Helper()
		p, err := open(w.p)
		w.must(err)
		defer p.close()
		if s, err := p.sockets(); err != nil || s.open != want {
			t.Errorf("%d open, %v; want %d", s.open, err, want)
		}
	}
	asks, _ := w.connection(w.p, stream, w.r, netip.AddrPortFrom(a.remote, 9100))
	w.must(unix.Shutdown(asks, unix.SHUT_WR))
	open(1)
	_, answered := w.connection(w.p, stream, w.r, netip.AddrPortFrom(a.remote, 9101))
	w.must(unix.Shutdown(answered, unix.SHUT_WR))
	open(2)
	left, _ := w.connection(w.p, stream, w.r, netip.AddrPortFrom(a.remote, 9102))
	open(3)
	w.must(unix.Dup3(answered, left, unix.O_CLOEXEC)) // closes it, and keeps its number ours
	open(2)
	// The pod with itself: nothing is captured there.
	w.connection(w.p, stream, w.p, netip.AddrPortFrom(a.pod, 9103))
	open(2)
}

// This kernel has everything; a kernel's refusals are read as what they prove.
func TestKernel(t *testing.T) {
	w := newWorld(t)
	p, err := open(w.p)
	w.must(err)
	defer p.close()
	before := state(t, w.p)
	for _, f := range (Config{Mode: TProxy, DNS: true}).features() {
		if answer, err := p.probe(f); answer != Works {
			t.Errorf("%s: %v (%v)", f.name, answer, err)
		}
	}
	same(t, "after", state(t, w.p), before)
	if answer, _ := p.probe(feature{base: chain{name: "c", kind: "nosuchtype", hook: "output", jump: "-"}}); answer != Absent {
		t.Errorf("a type that there is not: %v", answer)
	}
	for err, want := range map[error]Answer{nil: Works, fmt.Errorf("x: %w", unix.EOPNOTSUPP): Absent, unix.EBUSY: Unknown, errors.New("?"): Unknown} {
		if got := judge(err); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
	if err := lacks(unix.EPERM, "CAP_NET_ADMIN"); !errors.Is(err, ErrCapability) || !strings.Contains(err.Error(), "setcap cap_sys_admin,cap_net_admin+ep /") {
		t.Errorf("got %v", err)
	}
}

// A pod with IPv6 disabled is captured in IPv4, and released.
func TestIPv6Disabled(t *testing.T) {
	w := newWorld(t)
	c := Config{Mode: Redirect, DNS: true, IPv6: true, VirtualInterfaces: []string{"tap0"}}
	w.people(v4(), c)
	w.sysctl(w.p, "net/ipv6/conf/all/disable_ipv6", "1")
	before := state(t, w.p)
	install(t, w.p, c)
	w.check(t, rows(v4(), c))
	text, err := Show(w.p)
	if want := "# ip -6 route add local ::/0 dev lo table 100 (not there: IPv6 is disabled on lo)\n"; err != nil || !strings.Contains(text, want) {
		t.Errorf("show: %v, no %q in\n%s", err, want, text)
	}
	remove(t, w.p)
	same(t, "after", state(t, w.p), before)
}

// BenchmarkInstall is what a pod's capture and release cost.
func BenchmarkInstall(b *testing.B) {
	ns := netnstest.New(b)
	for _, mode := range []Mode{Redirect, TProxy} {
		b.Run(string(mode), func(b *testing.B) {
			for b.Loop() {
				if _, err := Install(ns, Config{Mode: mode, DNS: true, IPv6: true}); err != nil {
					b.Fatal(err)
				}
				if err := Remove(ns); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
