package redirect

import "golang.org/x/sys/unix"

// tproxy is the inbound half of the tproxy mode, as Istio had it before 1.24; it
// stands in mangle / PREROUTING behind rule 3. The packets are not written to, so
// the listeners find the original destination as their own address.
func (c Config) tproxy() (rules []rule) {
	for _, name := range c.VirtualInterfaces {
		rules = append(rules, rule{id: "T0 " + name, why: "a guest's packets are outbound: see 5a", match: append(c.any(), iif(name), tcp()), then: []part{accept()}})
	}
	rules = c.each(rules, func(f family) rule {
		return rule{id: "T1", why: "the kubelet's probes go straight to the application", match: []part{f.from(f.probe), tcp()}, then: []part{accept()}}
	})
	rules = c.each(rules, func(f family) rule {
		return rule{id: "T2", why: "what the pod sends to itself, and ztunnel to the application, is not captured", match: []part{f.notTo(f.loopback), iif("lo"), tcp()}, then: []part{accept()}}
	})
	rules = c.each(rules, func(f family) rule {
		return rule{id: "T3", why: "HBONE goes to ztunnel's listener, though that is on loopback", match: []part{f.only(), dport(unix.IPPROTO_TCP, HBONEPort), notMark(ProxyMark)}, then: f.deliver(HBONEPort)}
	})
	// The TPROXY of iptables drops what finds no listener; the one of nftables
	// lets it pass, to the application. A captured pod is closed rather, and says
	// so as with REDIRECT: also to who has a connection that is older than the
	// rules, and would wait for ever.
	rules = append(rules,
		rule{id: "T4", why: "nobody listens there: closed", match: append(c.any(), dport(unix.IPPROTO_TCP, HBONEPort), notMark(ProxyMark)), then: []part{reset()}},
		rule{id: "T5", why: "answers to what the pod has sent", match: append(c.any(), tcp(), established()), then: []part{accept()}})
	if c.BypassInbound {
		return rules
	}
	rules = c.each(rules, func(f family) rule {
		return rule{id: "T6", why: "all other TCP that comes in goes to ztunnel", match: []part{f.notTo(f.loopback), tcp(), notMark(ProxyMark)}, then: f.deliver(InboundPort)}
	})
	return c.each(rules, func(f family) rule {
		return rule{id: "T7", why: "nobody listens there: closed", match: []part{f.notTo(f.loopback), tcp(), notMark(ProxyMark)}, then: []part{reset()}}
	})
}

// deliver hands the packet to the listener and marks it, so that it is routed to
// this host whatever its destination.
func (f family) deliver(p uint16) []part {
	return []part{f.tproxyTo(p), setMark(RouteMark), accept()}
}
