package redirect

import (
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/testmain"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { testmain.Run(m) }

// all is every configuration that makes different rules.
func all() map[string]Config {
	configs := make(map[string]Config)
	for _, mode := range []Mode{Redirect, TProxy} {
		for _, bits := range []int{0, 1, 2, 3, 4, 7, 8, 15} {
			c := Config{Mode: mode, DNS: bits&1 != 0, IPv6: bits&2 != 0, BypassInbound: bits&4 != 0}
			if bits&8 != 0 {
				c.VirtualInterfaces = []string{"tap0", "vnet-1.2_3"}
			}
			configs[fmt.Sprintf("%s/%04b", mode, bits)] = c
		}
	}
	return configs
}

// Whatever was there before, the same configuration makes the same rules; and
// Remove leaves what was there before the first, with somebody else's table, rule
// and route in place.
func TestInstallRemoveAgain(t *testing.T) {
	ns := netnstest.New(t)
	somebodyElse(t, ns)
	before := state(t, ns)
	first := make(map[string]string)
	for name, c := range all() {
		install(t, ns, c)
		first[name] = state(t, ns)
		install(t, ns, c)
		same(t, name+": again", state(t, ns), first[name])
		remove(t, ns)
		same(t, name+": removed", state(t, ns), before)
		remove(t, ns)
		install(t, ns, c)
		same(t, name+": removed and installed", state(t, ns), first[name])
		remove(t, ns)
	}
	// From one to another, without a removal in between: DNS and IPv6 come and go,
	// and the chains change their rules and their number.
	names := slices.Sorted(maps.Keys(first))
	for i, name := range names {
		other := names[(5*i+3)%len(names)]
		install(t, ns, all()[name])
		install(t, ns, all()[other])
		same(t, name+" -> "+other, state(t, ns), first[other])
	}
	remove(t, ns)
	same(t, "the end", state(t, ns), before)
}

// However many answers a transaction gets, none is lost: a pod would be captured, and
// its installation have failed.
func TestManyVirtualInterfaces(t *testing.T) {
	ns := netnstest.New(t)
	before := state(t, ns)
	for _, mode := range []Mode{Redirect, TProxy} {
		c := Config{Mode: mode, DNS: true, IPv6: true}
		for i := range 60 {
			c.VirtualInterfaces = append(c.VirtualInterfaces, fmt.Sprintf("veth%d", i))
		}
		install(t, ns, c)
		install(t, ns, c)
	}
	remove(t, ns)
	same(t, "removed", state(t, ns), before)
}

// What Show prints is what nft makes of it, to the last expression: the words and
// the expressions of each rule are two things, and nft knows that they are one.
func TestShowIsWhatNftSays(t *testing.T) {
	if _, err := exec.LookPath("nft"); err != nil {
		t.Log("there is no nft to compare with: scripts/need nft")
		return
	}
	for name, c := range all() {
		ns, other := netnstest.New(t), netnstest.New(t)
		install(t, ns, c)
		text, err := Show(ns)
		if err != nil {
			t.Fatal(err)
		}
		inside(t, other, text, "nft", "-f", "-")
		list := func(ns *netns.NS) string {
			out := inside(t, ns, "", "nft", "--debug=netlink", "list", "ruleset")
			return regexp.MustCompile(`(?m)^inet .*$`).ReplaceAllString(out, "") // numbers of rules
		}
		same(t, name, list(ns), list(other))
		// The configuration is told from the rules alone.
		if got := configOf(mustTables(t, ns)); fmt.Sprint(got) != fmt.Sprint(c) {
			t.Errorf("%s: taken for %+v", name, got)
		}
	}
}

func mustTables(t *testing.T, ns *netns.NS) []installed {
	t.Helper()
	p, err := open(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	tables, err := p.ownTables()
	if err != nil {
		t.Fatal(err)
	}
	return tables
}

// A pod that nobody has captured says so.
func TestShowNothing(t *testing.T) {
	ns := netnstest.New(t)
	text, err := Show(ns)
	if err != nil || !strings.Contains(text, "nothing is captured here") {
		t.Errorf("got %q, %v", text, err)
	}
}

// Rules that somebody has deleted or added are seen.
func TestShowTellsDifferences(t *testing.T) {
	ns := netnstest.New(t)
	install(t, ns, Config{Mode: Redirect})
	p, err := open(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	nat, out := tableOf(natTable), &nftables.Chain{Name: "istio-output", Table: tableOf(natTable)}
	rules, err := p.nft.GetRules(nat, out)
	if err != nil {
		t.Fatal(err)
	}
	gone := rules[len(rules)-1]
	p.nft.DelRule(&nftables.Rule{Table: nat, Chain: out, Handle: gone.Handle})
	p.nft.AddRule(&nftables.Rule{Table: nat, Chain: out, Exprs: []expr.Any{&expr.Counter{}}})
	if err := p.nft.Flush(); err != nil {
		t.Fatal(err)
	}
	text, err := Show(ns)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"# MISSING in the pod: ip daddr != 127.0.0.1 meta l4proto tcp", "# and 1 of somebody else's"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

// istio-cni's own tables have the same names, and are left alone.
func TestForeignTables(t *testing.T) {
	ns := netnstest.New(t)
	p, err := open(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	table := p.nft.AddTable(tableOf(natTable))
	p.nft.AddChain(&nftables.Chain{Name: "istio-output", Table: table})
	if err := p.nft.Flush(); err != nil {
		t.Fatal(err)
	}
	before := state(t, ns)
	if _, err := Install(ns, Config{Mode: Redirect}); !errors.Is(err, ErrForeign) {
		t.Errorf("got %v", err)
	}
	remove(t, ns)
	same(t, "after", state(t, ns), before)
}

// A failure at any step leaves the pod as it was.
func TestFailureLeavesNothing(t *testing.T) {
	for name, spoil := range map[string]struct {
		do   func(t *testing.T, p *pod)
		want error
	}{
		"table 100 is in use": {func(t *testing.T, p *pod) {
			r := v4().route()
			r.Type, r.LinkIndex, r.Scope, r.Protocol = unix.RTN_BLACKHOLE, 0, netlink.SCOPE_UNIVERSE, unix.RTPROT_STATIC
			if err := p.links.RouteAdd(r); err != nil {
				t.Fatal(err)
			}
		}, ErrTableInUse},
		// The route and the rule of IPv4 are in place by then.
		"table 100 of IPv6 is in use": {func(t *testing.T, p *pod) {
			r := v6().route()
			r.Type, r.Scope, r.Protocol = unix.RTN_BLACKHOLE, netlink.SCOPE_UNIVERSE, unix.RTPROT_STATIC
			if err := p.links.RouteAdd(r); err != nil {
				t.Fatal(err)
			}
		}, ErrTableInUse},
		"lo is down": {func(t *testing.T, p *pod) {
			lo, err := p.links.LinkByIndex(loIndex)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.links.LinkSetDown(lo); err != nil {
				t.Fatal(err)
			}
		}, ErrLoDown},
	} {
		t.Run(name, func(t *testing.T) {
			ns := netnstest.New(t)
			p, err := open(ns)
			if err != nil {
				t.Fatal(err)
			}
			defer p.close()
			spoil.do(t, p)
			before := state(t, ns)
			if _, err := Install(ns, Config{Mode: Redirect, IPv6: true}); !errors.Is(err, spoil.want) {
				t.Errorf("got %v", err)
			}
			same(t, "after", state(t, ns), before)
		})
	}
	// The transaction comes last; the kernel refuses what is too long for it.
	t.Run("the rules are refused", func(t *testing.T) {
		ns := netnstest.New(t)
		before := state(t, ns)
		p, err := open(ns)
		if err != nil {
			t.Fatal(err)
		}
		defer p.close()
		p.nft.AddChain(&nftables.Chain{Name: "x", Table: tableOf("there is no such table")})
		if _, err := p.install(Config{Mode: Redirect, IPv6: true}); !errors.Is(err, unix.ENOENT) {
			t.Errorf("got %v", err)
		}
		same(t, "after", state(t, ns), before)
	})
}

// An equal policy rule and route of somebody else's do, and stay.
func TestEqualRouteOfSomebodyElse(t *testing.T) {
	ns := netnstest.New(t)
	p, err := open(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	// Of IPv4 alone: IPv6 gets what it needs all the same.
	route, rule := v4().route(), v4().policyRule()
	route.Protocol, rule.Protocol = unix.RTPROT_STATIC, unix.RTPROT_STATIC
	if err := errors.Join(p.links.RouteAdd(route), p.links.RuleAdd(rule)); err != nil {
		t.Fatal(err)
	}
	before := state(t, ns)
	install(t, ns, Config{Mode: Redirect, IPv6: true})
	if there, ours, err := p.findRoute(v6()); !there || !ours || err != nil {
		t.Errorf("the route of IPv6: %v, %v, %v", there, ours, err)
	}
	remove(t, ns)
	same(t, "after", state(t, ns), before)
}
