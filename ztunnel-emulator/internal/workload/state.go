package workload

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
)

// State is what a file says, with its indexes. It is never changed, so any number
// of goroutines may read it, and what its methods return.
type State struct {
	warnings []string

	workloads   map[string]*Workload
	byAddr      map[NetworkAddress]*Workload
	byLocalName map[localName][]*Workload
	byHostname  map[string]*Workload

	services     map[NamespacedHostname]*Service
	servicesAt   map[NetworkAddress][]*Service
	servicesIn   map[string][]*Service // with CIDR VIPs, by network
	servicesFor  map[string][]*Service // by hostname
	staged       map[NamespacedHostname]map[string]*Endpoint
	policies     map[string]*Policy
	globals      []*Policy
	perNamespace map[string][]*Policy
}

type localName struct{ name, namespace, serviceAccount string }

// Empty is the state without a file: nobody is known.
func Empty() *State { return newState(&file{}, nil) }

// newState takes over f. Of two entries with one key the later one stays, in the
// place of the first, as in the real one.
func newState(f *file, warnings []string) *State {
	s := &State{
		warnings:     warnings,
		workloads:    make(map[string]*Workload, len(f.workloads)),
		byAddr:       make(map[NetworkAddress]*Workload, len(f.workloads)),
		byLocalName:  make(map[localName][]*Workload, len(f.workloads)),
		byHostname:   map[string]*Workload{},
		services:     make(map[NamespacedHostname]*Service, len(f.services)),
		servicesAt:   make(map[NetworkAddress][]*Service, len(f.services)),
		servicesIn:   map[string][]*Service{},
		servicesFor:  make(map[string][]*Service, len(f.services)),
		staged:       map[NamespacedHostname]map[string]*Endpoint{},
		policies:     make(map[string]*Policy, len(f.policies)),
		perNamespace: map[string][]*Policy{},
	}
	workloads := unique(s, "workload", f.workloads, s.workloads, func(w *Workload) string { return w.UID })
	services := unique(s, "service", f.services, s.services, (*Service).Key)
	policies := unique(s, "policy", f.policies, s.policies, (*Policy).Key)
	s.indexWorkloads(workloads)
	s.addEndpoints(workloads)
	s.indexServices(services)
	s.indexPolicies(policies)
	s.checkReferences(workloads)
	return s
}

// unique fills index and returns what stays, in order.
func unique[K comparable, T any](s *State, what string, all []*T, index map[K]*T, key func(*T) K) []*T {
	place := make(map[K]int, len(all))
	var kept []*T
	for _, v := range all {
		k := key(v)
		if i, twice := place[k]; twice {
			s.warn("%s %q is there more than once; the last one counts", what, fmt.Sprint(k))
			kept[i] = v
		} else {
			place[k] = len(kept)
			kept = append(kept, v)
		}
		index[k] = v
	}
	return kept
}

func (s *State) warn(format string, args ...any) {
	if len(s.warnings) < maxWarnings {
		s.warnings = append(s.warnings, oneLine(fmt.Sprintf(format, args...)))
	}
}

func (s *State) indexWorkloads(workloads []*Workload) {
	for _, w := range workloads {
		name := localName{w.Name, w.Namespace, w.ServiceAccount}
		s.byLocalName[name] = append(s.byLocalName[name], w)
		if w.Hostname != "" {
			s.byHostname[w.Hostname] = w
		}
		if w.NetworkMode == HostNetwork {
			continue
		}
		for _, ip := range w.IPs {
			at := NetworkAddress{w.Network, ip}
			if other := s.byAddr[at]; other == nil || w.rank() >= other.rank() {
				s.byAddr[at] = w
			}
		}
	}
}

// addEndpoints gives each workload to the services that it says it serves, as
// far as they want it in its health. What no service claims is staged.
func (s *State) addEndpoints(workloads []*Workload) {
	for _, w := range workloads {
		for key, ports := range w.services {
			e := &Endpoint{WorkloadUID: w.UID, Ports: ports, Status: w.Status}
			svc := s.services[key]
			switch {
			case svc == nil:
				if s.staged[key] == nil {
					s.staged[key] = map[string]*Endpoint{}
				}
				s.staged[key][w.UID] = e
			case svc.takes(w.Status):
				svc.Endpoints[w.UID] = e
			}
		}
	}
}

func (s *State) indexServices(services []*Service) {
	for _, svc := range services {
		s.servicesFor[svc.Hostname] = append(s.servicesFor[svc.Hostname], svc)
		for _, vip := range svc.VIPs {
			if !slices.Contains(s.servicesAt[vip], svc) {
				s.servicesAt[vip] = append(s.servicesAt[vip], svc)
			}
		}
		for _, c := range svc.CIDRVIPs {
			if !slices.Contains(s.servicesIn[c.Network], svc) {
				s.servicesIn[c.Network] = append(s.servicesIn[c.Network], svc)
			}
		}
		for _, uid := range slices.Sorted(maps.Keys(svc.Endpoints)) {
			e := svc.Endpoints[uid]
			if w := s.workloads[e.WorkloadUID]; w != nil {
				svc.reachable = append(svc.reachable, endpoint{e, w})
			}
		}
		for _, san := range svc.SubjectAltNames {
			if _, ok := parseIdentity(san); ok {
				svc.identities = append(svc.identities, san)
			}
		}
	}
}

func (s *State) indexPolicies(policies []*Policy) {
	for _, p := range policies {
		switch p.Scope {
		case ScopeGlobal:
			s.globals = append(s.globals, p)
		case ScopeNamespace:
			s.perNamespace[p.Namespace] = append(s.perNamespace[p.Namespace], p)
		}
	}
}

// checkReferences warns of policies that are named and not there: they protect
// nobody.
func (s *State) checkReferences(workloads []*Workload) {
	for _, w := range workloads {
		for _, key := range w.AuthorizationPolicies {
			if s.policies[key] == nil {
				s.warn("workload %q names the policy %q, which is not there", w.UID, key)
			}
		}
	}
}

// Warnings returns what is allowed and yet seldom meant.
func (s *State) Warnings() []string { return s.warnings }

// Workloads returns all, by uid.
func (s *State) Workloads() []*Workload {
	return slices.SortedFunc(maps.Values(s.workloads), func(a, b *Workload) int { return cmp.Compare(a.UID, b.UID) })
}

// Services returns all, by hostname and then namespace.
func (s *State) Services() []*Service {
	return slices.SortedFunc(maps.Values(s.services), func(a, b *Service) int {
		return cmp.Or(cmp.Compare(a.Hostname, b.Hostname), cmp.Compare(a.Namespace, b.Namespace))
	})
}

// Policies returns all, by key.
func (s *State) Policies() []*Policy {
	return slices.SortedFunc(maps.Values(s.policies), func(a, b *Policy) int { return cmp.Compare(a.Key(), b.Key()) })
}

// Staged returns the endpoints, by workload uid, of services that are not there.
func (s *State) Staged() map[NamespacedHostname]map[string]*Endpoint { return s.staged }

// WorkloadByUID returns a workload, or nil.
func (s *State) WorkloadByUID(uid string) *Workload { return s.workloads[uid] }

// WorkloadAt returns the workload that has the address for itself, or nil.
func (s *State) WorkloadAt(network string, ip netip.Addr) *Workload {
	return s.byAddr[NetworkAddress{network, ip.Unmap()}]
}

// LocalWorkload returns the workload that a pod of this node is, or nil. With
// node given (NODE_NAME) it must be on that node.
func (s *State) LocalWorkload(name, namespace, serviceAccount, node string) *Workload {
	for _, w := range s.byLocalName[localName{name, namespace, serviceAccount}] {
		if node == "" || w.Node == node {
			return w
		}
	}
	return nil
}

// ServiceAt returns the service that a client of that namespace reaches at an
// address, or nil: one with just this VIP, else one with a CIDR VIP around it.
func (s *State) ServiceAt(network string, ip netip.Addr, namespace string) *Service {
	ip = ip.Unmap()
	if svc := best(s.servicesAt[NetworkAddress{network, ip}], namespace); svc != nil {
		return svc
	}
	var found *Service
	var most [3]int
	for _, svc := range s.servicesIn[network] {
		if !svc.VisibleTo(namespace) {
			continue
		}
		for _, c := range svc.CIDRVIPs {
			if c.Network != network || !c.Prefix.Contains(ip) {
				continue
			}
			rank := [3]int{truth(svc.Namespace == namespace), c.Prefix.Bits(), truth(svc.Canonical)}
			if found == nil || slices.Compare(rank[:], most[:]) > 0 {
				found, most = svc, rank
			}
		}
	}
	return found
}

// ServiceFor returns the service of that hostname that a client of that namespace
// means, or nil.
func (s *State) ServiceFor(hostname, namespace string) *Service {
	return best(s.servicesFor[hostname], namespace)
}

// ServicesFor returns all services of a hostname, in the order of the file.
func (s *State) ServicesFor(hostname string) []*Service { return s.servicesFor[hostname] }

// best returns of those whom the client may see the one of its own namespace,
// else the canonical one, else the first.
func best(services []*Service, namespace string) *Service {
	var found *Service
	most := -1
	for _, svc := range services {
		if !svc.VisibleTo(namespace) {
			continue
		}
		if rank := 2*truth(svc.Namespace == namespace) + truth(svc.Canonical); rank > most {
			found, most = svc, rank
		}
	}
	return found
}

func truth(b bool) int {
	if b {
		return 1
	}
	return 0
}
