package workload

import (
	"fmt"
	"net/netip"
	"slices"
)

// Target is where a tunnelled connection ends.
type Target struct {
	// Addr is the application: what policies are about, and what to connect to.
	// With Proxy, and unless LOCALHOST_APP_TUNNEL says otherwise, it is reached at
	// its port of the loopback address of the same family.
	Addr netip.AddrPort
	// Service is the one that the authority named, or nil.
	Service *Service
	// Proxy says that the application wants a PROXY header, version 2, after the
	// 200 and before any payload. It names the peer of the TLS connection as the
	// source, Original as the destination, and the peer's identity as TLV 0xD0.
	Proxy    bool
	Original netip.AddrPort
}

// InboundError is why a tunnelled connection is not delivered, and the status
// that says so. Its text is for the access log.
type InboundError struct {
	Status int
	Text   string
}

func (e *InboundError) Error() string { return e.Text }

// Recursive is what the real one calls a connection to one of its own ports.
const Recursive = "attempted recursive call to ourselves"

// The statuses, without package net/http, which is large.
const (
	statusBadRequest  = 400
	statusUnavailable = 503
)

func badRequest(format string, args ...any) error {
	return &InboundError{statusBadRequest, fmt.Sprintf(format, args...)}
}

func unavailable(format string, args ...any) error {
	return &InboundError{statusUnavailable, fmt.Sprintf(format, args...)}
}

// InboundTarget decides where a CONNECT for such an authority ends, which came to
// the local workload at the address connDst, on the network that we are on. It
// always ends at that address; what the authority adds is the port. An error is
// an *InboundError.
func (s *State) InboundTarget(local *Workload, network string, connDst netip.Addr, authority string) (Target, error) {
	a, err := parseAuthority(authority)
	if err != nil {
		return Target{}, badRequest("%v", err)
	}
	connDst = connDst.Unmap()
	if a.host == "" && !s.acceptable(local, network, connDst, a.addr.Addr()) {
		return Target{}, badRequest("ip mismatch: %s != %s", connDst, a.addr.Addr())
	}
	t := Target{Original: a.addr}
	port := a.addr.Port()
	if a.host != "" {
		if port, err = s.namedPort(local, a, &t); err != nil {
			return Target{}, err
		}
	}
	tunnel := local.ApplicationTunnel
	if t.Proxy = tunnel != nil && tunnel.Protocol == TunnelPROXY; !t.Proxy {
		t.Original = netip.AddrPort{}
	} else if !t.Original.IsValid() {
		vip, ok := vipOf(t.Service, network)
		if !ok {
			return Target{}, unavailable("the service %s has no VIP to name in a PROXY header", t.Service.Hostname)
		}
		t.Original = netip.AddrPortFrom(vip, a.port)
	}
	if IllegalPort(port) {
		return Target{}, unavailable(Recursive)
	}
	if tunnel != nil && tunnel.Port != nil {
		port = *tunnel.Port
	}
	t.Addr = netip.AddrPortFrom(connDst, port)
	return t, nil
}

// acceptable tells whether a connection to one address may ask for another: only
// of a proxy, and of a waypoint for what is behind it.
func (s *State) acceptable(local *Workload, network string, connDst, asked netip.Addr) bool {
	if asked == connDst || local.ApplicationTunnel != nil {
		return true
	}
	isWaypoint := func(g *Gateway) bool {
		if g == nil {
			return false
		}
		w, svc := s.referred(g, local.Namespace)
		return w != nil && w.Has(connDst) || svc != nil && svc.Endpoints[local.UID] != nil
	}
	if w := s.WorkloadAt(network, asked); w != nil {
		return isWaypoint(w.Waypoint)
	}
	// Whoever asks has been sent here for a service that it may see. Whether we may
	// see it too does not matter.
	for _, svc := range s.servicesWith(NetworkAddress{network, asked}) {
		if isWaypoint(svc.Waypoint) {
			return true
		}
		for _, w := range svc.WeightedWaypoint {
			if isWaypoint(w.Gateway) {
				return true
			}
		}
	}
	return false
}

// servicesWith returns those with such a VIP, or else those with a CIDR VIP around
// it.
func (s *State) servicesWith(vip NetworkAddress) []*Service {
	if exact := s.servicesAt[vip]; exact != nil {
		return exact
	}
	var around []*Service
	for _, svc := range s.servicesIn[vip.Network] {
		has := func(c CIDR) bool { return c.Network == vip.Network && c.Prefix.Contains(vip.IP) }
		if slices.ContainsFunc(svc.CIDRVIPs, has) {
			around = append(around, svc)
		}
	}
	return around
}

// namedPort finds the port of the local workload that a service's port leads to.
func (s *State) namedPort(local *Workload, a authority, t *Target) (uint16, error) {
	t.Service = s.ServiceFor(a.host, local.Namespace)
	if t.Service == nil {
		return 0, unavailable("unknown service: %s", a.host)
	}
	if e := t.Service.Endpoints[local.UID]; e != nil {
		if port, ok := e.Ports[a.port]; ok {
			return port, nil
		}
	}
	if port := t.Service.Ports[a.port]; port > 0 {
		return port, nil
	}
	return 0, unavailable("no port %d of service %s", a.port, a.host)
}

// vipOf returns a VIP, if there is one: rather of this network than of another,
// and rather IPv4.
func vipOf(svc *Service, network string) (netip.Addr, bool) {
	var found netip.Addr
	most := -1
	for _, vip := range svc.VIPs {
		if rank := 2*truth(vip.Network == network) + truth(vip.IP.Is4()); rank > most {
			found, most = vip.IP, rank
		}
	}
	return found, most >= 0
}
