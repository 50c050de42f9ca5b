package redirect

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// row is a row of the truth table (section 10 of the sheet): who asks what, and
// who answers, with what he sees.
type row struct {
	what   string
	from   byte // 'P', 'R' or 'G': the pod, the remote, the guest
	socket socketOf
	to     netip.AddrPort
	want   string // "" for no answer at all
}

// rows makes the table for a family and a configuration.
func rows(f family, c Config) []row {
	a := addressesOf(f)
	at := netip.AddrPortFrom
	tcp, udp := socketOf{kind: unix.SOCK_STREAM}, socketOf{kind: unix.SOCK_DGRAM}
	marked := func(s socketOf) socketOf { s.mark = ProxyMark; return s }
	spoof := func(s socketOf, src netip.Addr) socketOf { s.transparent, s.bind = true, at(src, 0); return s }
	bound := func(s socketOf, src netip.Addr) socketOf { s.bind = at(src, 0); return s }

	// Where an endpoint ends, and what it sees.
	outbound := func(dst netip.AddrPort) string {
		return fmt.Sprintf("15001 peer=%v local=%v dst=%v", a.pod, at(a.loopback, OutboundPort), dst)
	}
	dns := func(dst netip.AddrPort) string {
		if !c.DNS {
			return outbound(dst)
		}
		return fmt.Sprintf("15053 peer=%v local=%v dst=%v", a.pod, at(a.loopback, DNSPort), dst)
	}
	inbound := func(peer netip.Addr, port uint16) string {
		local := at(a.pod, InboundPort)
		switch {
		case c.BypassInbound:
			return ""
		case c.Mode == TProxy:
			local = at(a.pod, port) // nobody has written to the packet
		}
		return fmt.Sprintf("15006 peer=%v local=%v dst=%v", peer, local, at(a.pod, port))
	}
	direct := func(name string, peer netip.Addr, dst netip.AddrPort) string {
		return fmt.Sprintf("%s peer=%v local=%v dst=%v", name, peer, dst, dst)
	}
	plainOrCaptured := inbound(a.remote, appPort)
	if c.BypassInbound {
		plainOrCaptured = direct("app", a.remote, at(a.pod, appPort))
	}
	udpDNS := fmt.Sprintf("15053 peer=%v", a.pod)
	if !c.DNS {
		udpDNS = fmt.Sprintf("remote peer=%v", a.pod)
	}
	ownDNS := dns(at(a.pod, 53))
	if !c.DNS {
		ownDNS = direct("resolver", a.pod, at(a.pod, 53)) // by 12
	}

	list := []row{
		{"TCP to R", 'P', tcp, at(a.remote, 9000), outbound(at(a.remote, 9000))},
		{"TCP to R:15008", 'P', tcp, at(a.remote, HBONEPort), outbound(at(a.remote, HBONEPort))},
		{"TCP to the pod's own address", 'P', tcp, at(a.pod, appPort), direct("app", a.pod, at(a.pod, appPort))},
		{"TCP to loopback", 'P', tcp, at(a.loopback, appPort), direct("app", a.loopback, at(a.loopback, appPort))},
		{"TCP to a service's address", 'P', tcp, at(a.vip, 80), outbound(at(a.vip, 80))},
		{"UDP 53 to R", 'P', udp, at(a.remote, 53), udpDNS},
		{"TCP 53 to R", 'P', tcp, at(a.remote, 53), dns(at(a.remote, 53))},
		{"UDP 53 to the pod's own address", 'P', udp, at(a.pod, 53), fmt.Sprintf("resolver peer=%v", a.pod)},
		{"UDP 53 to loopback", 'P', udp, at(a.loopback, 53), fmt.Sprintf("resolver peer=%v", a.loopback)},
		{"TCP 53 to the pod's own address", 'P', tcp, at(a.pod, 53), ownDNS},
		{"TCP 53 to loopback", 'P', tcp, at(a.loopback, 53), direct("resolver", a.loopback, at(a.loopback, 53))},
		{"other UDP to R", 'P', udp, at(a.remote, 7000), fmt.Sprintf("remote peer=%v", a.pod)},

		{"plaintext from R", 'R', tcp, at(a.pod, appPort), plainOrCaptured},
		{"UDP from R", 'R', udp, at(a.pod, 7000), fmt.Sprintf("app peer=%v", a.remote)},
		{"the kubelet's probe", 'R', bound(tcp, a.probe), at(a.pod, appPort), direct("app", a.probe, at(a.pod, appPort))},

		{"a guest's TCP", 'G', tcp, at(a.remote, 9000), fmt.Sprintf("15001 peer=%v local=%v dst=%v", a.guest, at(a.tap, OutboundPort), at(a.remote, 9000))},
		{"a guest's TCP to the pod", 'G', tcp, at(a.pod, appPort), fmt.Sprintf("15001 peer=%v local=%v dst=%v", a.guest, at(a.tap, OutboundPort), at(a.pod, appPort))},
		{"a guest's DNS over TCP", 'G', tcp, at(a.remote, 53), fmt.Sprintf("15001 peer=%v local=%v dst=%v", a.guest, at(a.tap, OutboundPort), at(a.remote, 53))},
		{"a guest's UDP", 'G', udp, at(a.remote, 7000), fmt.Sprintf("remote peer=%v", a.guest)},
		{"a guest's DNS over UDP", 'G', udp, at(a.remote, 53), fmt.Sprintf("remote peer=%v", a.guest)},

		{"ztunnel: TCP to R", 'P', marked(tcp), at(a.remote, 9000), direct("remote", a.pod, at(a.remote, 9000))},
		{"ztunnel, with somebody else's bits in its mark", 'P', socketOf{kind: unix.SOCK_STREAM, mark: 0xabc000 | ProxyMark}, at(a.remote, 9000), direct("remote", a.pod, at(a.remote, 9000))},
		{"ztunnel: UDP 53 to R", 'P', marked(udp), at(a.remote, 53), fmt.Sprintf("remote peer=%v", a.pod)},
		{"ztunnel: TCP 53 to R", 'P', marked(tcp), at(a.remote, 53), direct("remote", a.pod, at(a.remote, 53))},
		{"ztunnel: to the application as R", 'P', spoof(marked(tcp), a.remote), at(a.pod, appPort), direct("app", a.remote, at(a.pod, appPort))},
		{"ztunnel: to the application as P", 'P', bound(marked(tcp), a.pod), at(a.pod, appPort), direct("app", a.pod, at(a.pod, appPort))},
		{"ztunnel: to the application on loopback", 'P', marked(tcp), at(a.loopback, appPort), direct("app", a.loopback, at(a.loopback, appPort))},
		{"as R, but without the mark", 'P', spoof(tcp, a.remote), at(a.pod, appPort), ""},
	}
	if f.twin == "" {
		other, resolver := netip.MustParseAddr("127.0.0.5"), netip.MustParseAddr("127.0.0.53")
		stub := dns(at(resolver, 53))
		if c.DNS { // the source of what is sent to 127.0.0.53
			stub = strings.Replace(stub, a.pod.String(), "127.0.0.1", 1)
		} else {
			stub = direct("resolver", a.loopback, at(resolver, 53))
		}
		list = append(list,
			row{"TCP to another loopback address", 'P', tcp, at(other, appPort), direct("app", a.loopback, at(other, appPort))},
			row{"UDP 53 to 127.0.0.53", 'P', udp, at(resolver, 53), fmt.Sprintf("resolver peer=%v", a.loopback)},
			row{"TCP 53 to 127.0.0.53", 'P', tcp, at(resolver, 53), stub})
	}
	if !c.BypassInbound {
		list = append(list,
			row{"from R to a closed port", 'R', tcp, at(a.pod, 8099), inbound(a.remote, 8099)},
			row{"from R to port 53", 'R', tcp, at(a.pod, 53), inbound(a.remote, 53)},
			row{"from R to 15001", 'R', tcp, at(a.pod, OutboundPort), inbound(a.remote, OutboundPort)},
			row{"from R to 15006", 'R', tcp, at(a.pod, InboundPort), inbound(a.remote, InboundPort)})
	}
	if c.BypassInbound && c.Mode == Redirect {
		// Nothing stands in between, so ztunnel itself has to refuse these.
		list = append(list,
			row{"from R to 15001", 'R', tcp, at(a.pod, OutboundPort), direct("15001", a.remote, at(a.pod, OutboundPort))},
			row{"from R to 15006", 'R', tcp, at(a.pod, InboundPort), direct("15006", a.remote, at(a.pod, InboundPort))})
	}
	hbone := func(peer netip.Addr) string { return direct("15008", peer, at(a.pod, HBONEPort)) }
	list = append(list, row{"HBONE from R", 'R', tcp, at(a.pod, HBONEPort), hbone(a.remote)})
	if c.Mode == Redirect {
		list = append(list,
			row{"the kubelet's probe of 15008", 'R', bound(tcp, a.probe), at(a.pod, HBONEPort), hbone(a.probe)},
			// In the other mode the listener is on loopback.
			row{"TCP to the pod's own address, port 15008", 'P', tcp, at(a.pod, HBONEPort), hbone(a.pod)})
	}
	return list
}

// people puts everybody in place who answers. In the mode tproxy the stand-ins
// for ztunnel are on loopback, unless they are to be wide.
func (w *world) people(f family, c Config) {
	w.t.Helper()
	a := addressesOf(f)
	wild := netip.IPv4Unspecified()
	if f.twin != "" {
		wild = netip.IPv6Unspecified()
	}
	at := netip.AddrPortFrom
	stream := func(bind netip.AddrPort) socketOf { return socketOf{kind: unix.SOCK_STREAM, bind: bind} }
	dgram := func(bind netip.AddrPort) socketOf { return socketOf{kind: unix.SOCK_DGRAM, bind: bind} }
	ztunnel := func(s socketOf) socketOf { s.mark, s.transparent = ProxyMark, s.kind == unix.SOCK_STREAM; return s }
	in := wild
	if c.Mode == TProxy && !w.wide {
		in = a.loopback
	}
	w.listen(w.p, "15001", ztunnel(stream(at(wild, OutboundPort)))) // a guest's traffic comes in by tap0
	w.listen(w.p, "15006", ztunnel(stream(at(in, InboundPort))))
	w.listen(w.p, "15008", ztunnel(stream(at(in, HBONEPort))))
	w.listen(w.p, "15053", ztunnel(stream(at(a.loopback, DNSPort))))
	w.listen(w.p, "15053", ztunnel(dgram(at(a.loopback, DNSPort))))
	w.listen(w.p, "app", stream(at(wild, appPort)))
	w.listen(w.p, "app", dgram(at(wild, 7000)))
	w.listen(w.p, "resolver", stream(at(wild, 53)))
	// Not on the wildcard: the answer has to come from where the question went.
	w.listen(w.p, "resolver", dgram(at(a.pod, 53)))
	w.listen(w.p, "resolver", dgram(at(a.loopback, 53)))
	if f.twin == "" {
		w.listen(w.p, "resolver", dgram(netip.MustParseAddrPort("127.0.0.53:53")))
	}
	for _, port := range []uint16{9000, HBONEPort, 53} {
		w.listen(w.r, "remote", stream(at(wild, port)))
	}
	for _, port := range []uint16{53, 7000} {
		w.listen(w.r, "remote", dgram(at(wild, port)))
	}
}

// Each row with real packets, both families, both modes, with DNS capture and
// without, and for an ingress.
func TestTruthTable(t *testing.T) {
	for _, c := range []Config{
		{Mode: Redirect, DNS: true, IPv6: true},
		{Mode: Redirect, IPv6: true},
		{Mode: Redirect, DNS: true, IPv6: true, BypassInbound: true},
		{Mode: TProxy, DNS: true, IPv6: true},
		{Mode: TProxy, IPv6: true, BypassInbound: true},
	} {
		c.VirtualInterfaces = []string{"tap0"}
		t.Run(fmt.Sprintf("%s,dns=%v,ingress=%v", c.Mode, c.DNS, c.BypassInbound), func(t *testing.T) {
			w := newWorld(t)
			for _, f := range c.families() {
				w.people(f, c)
			}
			install(t, w.p, c)
			for _, f := range c.families() {
				t.Run(f.name, func(t *testing.T) { w.check(t, rows(f, c)) })
			}
		})
	}
}

// TPROXY finds listeners on the wildcard address, too.
func TestTProxyToWildcard(t *testing.T) {
	c := Config{Mode: TProxy, DNS: true, IPv6: true, VirtualInterfaces: []string{"tap0"}}
	w := newWorld(t)
	w.wide = true
	install(t, w.p, c) // before anybody listens
	for _, f := range c.families() {
		w.people(f, c)
		t.Run(f.name, func(t *testing.T) { w.check(t, rows(f, c)) })
	}
}

// Where IPv6 is not captured it is left alone altogether, DNS and guests, too.
func TestIPv6LeftAlone(t *testing.T) {
	for _, mode := range []Mode{Redirect, TProxy} {
		t.Run(string(mode), func(t *testing.T) {
			c := Config{Mode: mode, DNS: true, VirtualInterfaces: []string{"tap0"}}
			w := newWorld(t)
			w.people(v4(), c)
			w.people(v6(), c)
			install(t, w.p, c)
			w.check(t, rows(v4(), c))
			a, at := addressesOf(v6()), netip.AddrPortFrom
			tcp, udp := socketOf{kind: unix.SOCK_STREAM}, socketOf{kind: unix.SOCK_DGRAM}
			seen := func(name string, peer netip.Addr, at netip.AddrPort) string {
				return fmt.Sprintf("%s peer=%v local=%v dst=%v", name, peer, at, at)
			}
			w.check(t, []row{
				{"IPv6: TCP to R", 'P', tcp, at(a.remote, 9000), seen("remote", a.pod, at(a.remote, 9000))},
				{"IPv6: UDP 53 to R", 'P', udp, at(a.remote, 53), fmt.Sprintf("remote peer=%v", a.pod)},
				{"IPv6: TCP 53 to R", 'P', tcp, at(a.remote, 53), seen("remote", a.pod, at(a.remote, 53))},
				{"IPv6: plaintext from R", 'R', tcp, at(a.pod, appPort), seen("app", a.remote, at(a.pod, appPort))},
				{"IPv6: a guest's TCP", 'G', tcp, at(a.remote, 9000), seen("remote", a.guest, at(a.remote, 9000))},
			})
		})
	}
}

func (w *world) check(t *testing.T, rows []row) {
	from := map[byte]*netns.NS{'P': w.p, 'R': w.r, 'G': w.g}
	for _, r := range rows {
		t.Run(r.what, func(t *testing.T) {
			wait := patience
			if r.want == "" {
				wait = silence
			}
			got, err := w.ask(from[r.from], r.socket, r.to, wait)
			switch {
			case r.want == "" && err == nil:
				t.Errorf("answered by %s", got)
			case r.want != "" && err != nil:
				t.Errorf("%v; want %s", err, r.want)
			case got != r.want:
				t.Errorf("got  %s\nwant %s", got, r.want)
			}
		})
	}
}
