package redirect

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns/netnstest"
)

// A list that was changed meanwhile is asked for again, but not for ever.
func TestWhole(t *testing.T) {
	for interrupted, want := range map[int]error{0: nil, 4: nil, 5: netlink.ErrDumpInterrupted, 9: netlink.ErrDumpInterrupted} {
		asked := 0
		all, err := whole(func() ([]int, error) {
			if asked++; asked <= interrupted {
				return nil, netlink.ErrDumpInterrupted
			}
			return []int{asked}, nil
		})
		if !errors.Is(err, want) || (err == nil) != (len(all) == 1) || asked != min(interrupted+1, 5) {
			t.Errorf("%d times interrupted: %v, %v, asked %d times", interrupted, all, err, asked)
		}
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

	// Switched on later it gets what it lacks, and off again it has lost it.
	install(t, w.p, c)
	w.sysctl(w.p, "net/ipv6/conf/all/disable_ipv6", "0")
	install(t, w.p, c)
	if text, err := Show(w.p); err != nil || strings.Contains(text, "not there") || strings.Contains(text, "MISSING") {
		t.Errorf("switched on: %v\n%s", err, text)
	}
	w.sysctl(w.p, "net/ipv6/conf/all/disable_ipv6", "1")
	remove(t, w.p)
	same(t, "off again, and removed", state(t, w.p), before)
}

// The kernel drops the IPv6 routes of lo when that goes down, and gives none back.
func TestLoGoesDown(t *testing.T) {
	w := &world{t: t, p: netnstest.New(t)}
	c := Config{Mode: Redirect, DNS: true, IPv6: true}
	before := state(t, w.p)
	lo := func(set func(*netlink.Handle, netlink.Link) error) {
		t.Helper()
		h := w.links(w.p)
		link, err := h.LinkByIndex(loIndex)
		w.must(err)
		w.must(set(h, link))
	}
	install(t, w.p, c)
	captured := state(t, w.p)
	lo((*netlink.Handle).LinkSetDown)
	if _, err := Install(w.p, c); !errors.Is(err, ErrLoDown) {
		t.Errorf("with lo down: %v", err)
	}
	lo((*netlink.Handle).LinkSetUp)
	if text, err := Show(w.p); err != nil || !strings.Contains(text, "# ip -6 route add local ::/0 dev lo table 100 (MISSING in the pod)") {
		t.Errorf("show does not miss the route: %v\n%s", err, text)
	}
	install(t, w.p, c)
	same(t, "installed again", state(t, w.p), captured)

	lo((*netlink.Handle).LinkSetDown)
	remove(t, w.p)
	lo((*netlink.Handle).LinkSetUp)
	same(t, "removed with lo down", state(t, w.p), before)
}

// What makes ztunnel speak in the client's name is needed, each part of it: the
// route, the policy rule, the marks, and that the chain is of type route.
func TestOriginalSourceNeedsAll(t *testing.T) {
	w := newWorld(t)
	c := Config{Mode: Redirect, IPv6: true}
	for _, f := range c.families() {
		w.people(f, c)
	}
	p, err := open(w.p)
	w.must(err)
	defer p.close()
	for _, tt := range []struct {
		what  string
		spoil func(f family) error
	}{
		{"nothing is missing", nil},
		{"the route", func(f family) error { return p.links.RouteDel(f.route()) }},
		{"the policy rule", func(f family) error {
			if err := p.links.RuleDel(f.policyRule()); err != nil {
				return err
			}
			if text, err := Show(w.p); err != nil || !strings.Contains(text, "lookup 100 (MISSING in the pod)") {
				t.Errorf("show does not miss the policy rule: %v\n%s", err, text)
			}
			return nil
		}},
		{"the table mangle", func(family) error {
			p.nft.DelTable(tableOf(mangleTable))
			return p.nft.Flush()
		}},
		{"the type route", func(family) error {
			ours, err := p.ownTables()
			if err != nil {
				return err
			}
			p.replaceTables(ours, c.tables())
			base := &nftables.Chain{Name: "output", Table: tableOf(mangleTable)}
			p.nft.FlushChain(base)
			p.nft.DelChain(base)
			for _, t := range c.tables() {
				for _, ch := range t.chains {
					if t.name == mangleTable && ch.name == base.Name {
						ch.kind = nftables.ChainTypeFilter
						p.nft.AddChain(chainOf(base.Table, ch))
						p.nft.AddRule(&nftables.Rule{Table: base.Table, Chain: base, Exprs: jumpTo(ch.jump)})
					}
				}
			}
			return p.nft.Flush()
		}},
	} {
		for _, f := range c.families() {
			install(t, w.p, c)
			wait := patience
			if tt.spoil != nil {
				w.must(tt.spoil(f))
				wait = silence
			}
			a := addressesOf(f)
			asR := socketOf{kind: unix.SOCK_STREAM, mark: ProxyMark, transparent: true, bind: netip.AddrPortFrom(a.remote, 0)}
			got, err := w.ask(w.p, asR, netip.AddrPortFrom(a.pod, appPort), wait)
			if (err == nil) != (tt.spoil == nil) {
				t.Errorf("%s, %s: %q, %v", tt.what, f.name, got, err)
			}
			remove(t, w.p)
		}
	}
}
