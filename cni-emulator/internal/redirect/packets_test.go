package redirect

import (
	"fmt"
	"maps"
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

// Which rules the packets of a connection pass, told by the counters: what nat has
// decided for the first packet holds for all, a connection of ztunnel's to the
// application carries the mark, its answers come back by it, and somebody else's
// bits of the mark stay.
func TestCounters(t *testing.T) {
	w := newWorld(t)
	c := Config{Mode: Redirect, DNS: true, IPv6: true}
	for _, f := range c.families() {
		w.people(f, c)
	}
	// Somebody marks each connection that comes in, and counts those that have his
	// bits and ours.
	inside(t, w.p, `table inet somebody {
		chain before { type filter hook prerouting priority -160; ct mark set ct mark | 0x50000; }
		chain behind { type filter hook prerouting priority -140; ct mark == 0x50111 counter; }
	}`, "nft", "-f", "-")
	p, err := open(w.p)
	w.must(err)
	defer p.close()
	// passed returns the rules that a packet has passed.
	passed := func() map[string]bool {
		ids := make(map[string]bool)
		tables, err := p.ownTables()
		w.must(err)
		for _, in := range tables {
			for _, rules := range in.chains {
				for _, r := range rules {
					if r.id != "" && r.packets > 0 {
						ids[r.id] = true
					}
				}
			}
		}
		return ids
	}
	for _, f := range c.families() {
		a, at := addressesOf(f), netip.AddrPortFrom
		stream := socketOf{kind: unix.SOCK_STREAM}
		asR := socketOf{kind: unix.SOCK_STREAM, mark: ProxyMark, transparent: true, bind: at(a.remote, 0)}
		for _, tt := range []struct {
			what string
			from *netns.NS
			s    socketOf
			to   netip.AddrPort
			want []string
		}{
			{"captured on the way in", w.r, stream, at(a.pod, appPort), []string{"7" + f.twin}},
			{"HBONE", w.r, stream, at(a.pod, HBONEPort), nil},
			// The answers of 15001 are marked, and lo brings them to prerouting: 3.
			// What the application then sends has the mark by 4, and is local anyway.
			{"captured on the way out", w.p, stream, at(a.remote, 9000), []string{"13" + f.twin, "3", "4"}},
			{"ztunnel to the application, as R", w.p, asR, at(a.pod, appPort), []string{"12" + f.twin, "3", "4"}},
		} {
			install(t, w.p, c) // with counters at zero
			if _, err := w.ask(tt.from, tt.s, tt.to, patience); err != nil {
				t.Fatalf("%s, %s: %v", f.name, tt.what, err)
			}
			want := make(map[string]bool)
			for _, id := range tt.want {
				want[id] = true
			}
			if got := passed(); !maps.Equal(got, want) {
				t.Errorf("%s, %s: passed %v, want %v", f.name, tt.what, got, want)
			}
		}
	}
	if out := inside(t, w.p, "", "nft", "list", "chain", "inet", "somebody", "behind"); strings.Contains(out, "packets 0") {
		t.Errorf("somebody else's bits of the mark are lost: %s", out)
	}
}
