package redirect

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// family is one of the two, as rules need it.
type family struct {
	nfproto         byte
	name, ip        string // as nft calls it: of the packet, of its header
	twin            string // what the number of its rules ends with
	source, dest    uint32 // offsets in the header, in bytes
	loopback, probe netip.Addr
}

func v4() family {
	return family{nfproto: unix.NFPROTO_IPV4, name: "ipv4", ip: "ip", source: 12, dest: 16, loopback: netip.AddrFrom4([4]byte{127, 0, 0, 1}), probe: Probe4}
}

func v6() family {
	return family{nfproto: unix.NFPROTO_IPV6, name: "ipv6", ip: "ip6", twin: "/6", source: 8, dest: 24, loopback: netip.IPv6Loopback(), probe: Probe6}
}

func (c Config) families() []family {
	if c.IPv6 {
		return []family{v4(), v6()}
	}
	return []family{v4()}
}

// each makes a rule and, if IPv6 is captured, its twin right behind it.
func (c Config) each(rules []rule, make func(f family) rule) []rule {
	for _, f := range c.families() {
		r := make(f)
		r.id += f.twin
		rules = append(rules, r)
	}
	return rules
}

// any is for rules that look at no address and so would match both families.
// Where IPv6 is not captured they say so. (The real agent's do not: there an IPv6
// DNS query is redirected to a port where nobody listens, though all other IPv6
// is left alone.)
func (c Config) any() []part {
	if c.IPv6 {
		return nil
	}
	return []part{v4().only()}
}

// natOutput is nat / OUTPUT: what the pod sends. A flow's first packet decides.
func (c Config) natOutput() []rule {
	rules := c.each(nil, func(f family) rule {
		return rule{id: "8", why: "answers to the kubelet's probes are nobody's business", match: []part{f.to(f.probe), tcp()}, then: []part{accept()}}
	})
	if c.DNS {
		rules = append(rules, rule{
			id: "9", why: "DNS goes to ztunnel; not ztunnel's own, and not what is asked of a resolver in the pod",
			match: append(c.any(), dport(unix.IPPROTO_UDP, 53), notOif("lo"), notMark(ProxyMark)), then: []part{redirectTo(DNSPort)},
		})
		// Faithful, though it is not what 9 does: only 127.0.0.1 is exempt, so TCP
		// to a resolver on 127.0.0.53 or on the pod's own address is captured.
		rules = c.each(rules, func(f family) rule {
			return rule{id: "10", why: "DNS over TCP, too", match: []part{f.notTo(f.loopback), dport(unix.IPPROTO_TCP, 53), notMark(ProxyMark)}, then: []part{redirectTo(DNSPort)}}
		})
	}
	rules = append(rules, rule{
		id: "11", why: "connections of ztunnel to the application are let through (in vain: nat looks at first packets only)",
		match: []part{tcp(), mark(RouteMark)}, then: []part{accept()},
	})
	rules = c.each(rules, func(f family) rule {
		return rule{id: "12", why: "the pod talks to itself, or ztunnel to the application: not proxied", match: []part{f.notTo(f.loopback), oif("lo")}, then: []part{accept()}}
	})
	return c.each(rules, func(f family) rule {
		return rule{id: "13", why: "all other TCP that the pod sends goes to ztunnel, unless ztunnel sends it", match: []part{f.notTo(f.loopback), tcp(), notMark(ProxyMark)}, then: []part{redirectTo(OutboundPort)}}
	})
}

// natPrerouting is nat / PREROUTING: what comes in, to be redirected.
func (c Config) natPrerouting() (rules []rule) {
	for _, name := range c.VirtualInterfaces {
		rules = append(rules,
			rule{id: "5a " + name, why: "a guest behind the pod sends: that is outbound", match: append(c.any(), iif(name), tcp()), then: []part{redirectTo(OutboundPort)}},
			rule{id: "5b " + name, why: "what 5a did not take", match: append(c.any(), iif(name), tcp()), then: []part{ret()}})
	}
	if c.BypassInbound || c.Mode != Redirect {
		return rules
	}
	rules = c.each(rules, func(f family) rule {
		return rule{id: "6", why: "the kubelet's probes go straight to the application", match: []part{f.from(f.probe), tcp()}, then: []part{accept()}}
	})
	return c.each(rules, func(f family) rule {
		return rule{id: "7", why: "all TCP that comes in goes to ztunnel; but HBONE, which is for ztunnel as it is, and what ztunnel sends to the application", match: []part{f.notTo(f.loopback), notTCPDport(HBONEPort), notMark(ProxyMark)}, then: []part{redirectTo(InboundPort)}}
	})
}

// manglePrerouting remembers whose connection it is.
func (c Config) manglePrerouting() []rule {
	rules := []rule{{id: "3", why: "ztunnel talks to the application over lo: remember that of the connection", match: []part{mark(ProxyMark)}, then: []part{setCtMark(RouteMark)}}}
	if c.Mode == TProxy {
		rules = append(rules, c.tproxy()...)
	}
	return rules
}

// mangleOutput is of type route: with another type the new mark would not make
// the kernel choose a route again.
func (c Config) mangleOutput() []rule {
	return []rule{{id: "4", why: "the application answers: by the mark the answer goes to ztunnel over lo, though it is addressed to the client", match: []part{ctMark(RouteMark)}, then: []part{restoreMark()}}}
}

// rawOutput and rawPrerouting keep ztunnel's own queries apart from the
// application's, whose addresses and ports may be the same.
func (c Config) rawOutput() []rule {
	return []rule{{id: "1", why: "ztunnel's own DNS queries: the application may use the same port", match: []part{mark(ProxyMark), dport(unix.IPPROTO_UDP, 53)}, then: []part{setZone(dnsZone)}}}
}

// The real agent's rule 2 puts every datagram from port 53 into the zone, and the
// masquerade of a guest's query, in zone 0, is then never undone. We ask which
// socket will get the datagram: only ztunnel's are marked.
func (c Config) rawPrerouting() []rule {
	return []rule{{id: "2", why: "the answers to 1: they are for a socket of ztunnel's", match: []part{sport(unix.IPPROTO_UDP, 53), notMark(ProxyMark), socketMark(ProxyMark)}, then: []part{setZone(dnsZone)}}}
}
