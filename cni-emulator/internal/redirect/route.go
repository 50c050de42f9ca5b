package redirect

import (
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// protocol marks the route and the rule as ours, as `ip route` and `ip rule` show
// it. Nobody else uses that number (rtnetlink(7): above RTPROT_STATIC it is free).
const protocol = 0x53

// loIndex is lo's number: the kernel gives each namespace its lo first.
const loIndex = 1

func (f family) af() int {
	if f.nfproto == unix.NFPROTO_IPV6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// policyRule sends what is marked to our table.
func (f family) policyRule() *netlink.Rule {
	r, mask := netlink.NewRule(), uint32(MarkMask)
	r.Family, r.Priority, r.Table, r.Mark, r.Mask, r.Protocol = f.af(), RulePriority, RouteTable, RouteMark, &mask, protocol
	return r
}

// route makes every address local: ztunnel's transparent sockets have the
// clients' addresses, and an answer to one of them must not leave by eth0.
func (f family) route() *netlink.Route {
	all := &net.IPNet{IP: make(net.IP, f.loopback.BitLen()/8), Mask: net.CIDRMask(0, f.loopback.BitLen())}
	return &netlink.Route{Family: f.af(), LinkIndex: loIndex, Dst: all, Table: RouteTable, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Protocol: protocol}
}

// addRoutes adds what is missing. undo takes out what it has added, and that alone;
// it is never nil.
//
// Each family is looked at for itself. (The real agent stops at the first "exists
// already", and so never adds the rule of IPv6 when that is switched on later.)
func (p *pod) addRoutes(c Config) (undo func() error, err error) {
	var added []func() error
	undo = func() (err error) {
		for _, f := range added {
			err = errors.Join(err, f())
		}
		return err
	}
	if err := p.loIsUp(); err != nil {
		return undo, err
	}
	for _, f := range c.families() {
		six := f.af() == unix.AF_INET6
		if six && p.no6 {
			continue // no IPv6 packet will ever ask for it
		}
		there, _, err := p.findRoute(f)
		if err != nil {
			return undo, err
		}
		// Disabled on lo it has no route there; the rule comes all the same, as in
		// the real agent.
		if !there && (!six || !p.off6) {
			if err := p.links.RouteAdd(f.route()); err != nil && !errors.Is(err, unix.EEXIST) {
				return undo, fmt.Errorf("add the %s route of table %d: %w", f.name, RouteTable, err)
			}
			added = append(added, func() error { return gone(p.links.RouteDel(f.route())) })
		}
		switch err := p.links.RuleAdd(f.policyRule()); {
		case err == nil:
			added = append(added, func() error { return gone(p.links.RuleDel(f.policyRule())) })
		case !errors.Is(err, unix.EEXIST):
			return undo, fmt.Errorf("add the %s policy rule: %w", f.name, err)
		}
	}
	return undo, nil
}

// loIsUp asks first: the kernel's own answer to the route would be that the
// network is down.
func (p *pod) loIsUp() error {
	lo, err := p.links.LinkByIndex(loIndex)
	if err != nil {
		return fmt.Errorf("look at lo: %w", err)
	}
	if lo.Attrs().Flags&net.FlagUp == 0 {
		return ErrLoDown
	}
	return nil
}

// findRoute tells whether our route is there, and whether it was we who added it.
// Routes of another kind in the table are somebody's who uses it for something
// else: with ours in it, all that he sends would stay in the pod.
func (p *pod) findRoute(f family) (there, ours bool, err error) {
	routes, err := whole(func() ([]netlink.Route, error) {
		return p.links.RouteListFiltered(f.af(), &netlink.Route{Table: RouteTable}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return false, false, fmt.Errorf("list the %s routes: %w", f.name, err)
	}
	for _, r := range routes {
		ones := 0
		if r.Dst != nil {
			ones, _ = r.Dst.Mask.Size()
		}
		if ones != 0 || r.Type != unix.RTN_LOCAL || r.LinkIndex != loIndex {
			return false, false, fmt.Errorf("%w: %v", ErrTableInUse, r)
		}
		there, ours = true, ours || r.Protocol == protocol
	}
	return there, ours, nil
}

// findPolicyRule tells whether our policy rule is there, and whether it was we who
// added it.
func (p *pod) findPolicyRule(f family) (there, ours bool, err error) {
	want := f.policyRule()
	rules, err := whole(func() ([]netlink.Rule, error) {
		return p.links.RuleListFiltered(f.af(), want, netlink.RT_FILTER_PRIORITY|netlink.RT_FILTER_TABLE|netlink.RT_FILTER_MARK|netlink.RT_FILTER_MASK)
	})
	if err != nil {
		return false, false, fmt.Errorf("list the %s policy rules: %w", f.name, err)
	}
	for _, r := range rules {
		there, ours = true, ours || r.Protocol == protocol
	}
	return there, ours, nil
}

// dropSurplusRoutes takes out what an earlier configuration had and this has not.
func (p *pod) dropSurplusRoutes(c Config) error {
	return p.delRoutes(func(f family) bool { return f.af() == unix.AF_INET6 && !c.IPv6 })
}

// delRoutes takes out our rule and route of the families that it is asked to, where
// they are there. An equal one that somebody else has added stays.
func (p *pod) delRoutes(of func(family) bool) error {
	for _, f := range []family{v4(), v6()} {
		if !of(f) {
			continue
		}
		_, ours, err := p.findPolicyRule(f)
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return err
		}
		if ours {
			if err := gone(p.links.RuleDel(f.policyRule())); err != nil {
				return fmt.Errorf("delete the %s policy rule: %w", f.name, err)
			}
		}
		_, ours, err = p.findRoute(f)
		if err != nil && !errors.Is(err, ErrTableInUse) {
			return err
		}
		if ours {
			if err := gone(p.links.RouteDel(f.route())); err != nil {
				return fmt.Errorf("delete the %s route of table %d: %w", f.name, RouteTable, err)
			}
		}
	}
	return nil
}

// whole asks for a list until it was not changed while the kernel told it
// (NLM_F_DUMP_INTR), five times at most, as the real agent does: one that lacks
// something would have us leave it behind.
func whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range 5 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// gone takes "it is not there" for success: that is what was wanted. (For the real
// agent it is an error, so its second removal fails.)
func gone(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}
