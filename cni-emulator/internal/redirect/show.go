package redirect

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// Show returns the rules of a pod as a script for `nft -f`, each with a comment on
// why it exists and with its counters as they are now. ns stays the caller's.
func Show(ns *netns.NS) (string, error) {
	p, err := open(ns)
	if err != nil {
		return "", err
	}
	defer p.close()
	now, err := p.ownTables()
	if err == nil && len(now) == 0 {
		err = p.istioChains()
	}
	if errors.Is(err, ErrForeign) {
		return fmt.Sprintf("# %v\n", err), nil
	}
	if err != nil {
		return "", fmt.Errorf("show the rules of %v: %w", p.id, p.explain(err, basics()))
	}
	if len(now) == 0 {
		return fmt.Sprintf("# %v: nothing is captured here\n", p.id), nil
	}
	c := configOf(now)
	var b bytes.Buffer
	fmt.Fprintf(&b, "# %v: capture %s, DNS %s, IPv6 %s\n", p.id, c.Mode, onOff(c.DNS), onOff(c.IPv6))
	for _, t := range c.tables() {
		t.print(&b, now)
	}
	for _, f := range c.families() {
		if err := p.printRoutes(&b, f); err != nil {
			return "", err
		}
	}
	return b.String(), nil
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// print prints a table as it should be, and what the kernel has that differs.
func (t table) print(b *bytes.Buffer, now []installed) {
	have := installed{}
	if i := slices.IndexFunc(now, func(in installed) bool { return in.name == t.name }); i >= 0 {
		have = now[i]
	}
	fmt.Fprintf(b, "\ntable inet %s {\n", t.name)
	for i, c := range t.chains {
		if i > 0 {
			fmt.Fprintln(b)
		}
		fmt.Fprintf(b, "\tchain %s {\n", c.name)
		strangers := len(have.chains[c.name]) - len(c.rules)
		if c.jump != "" {
			fmt.Fprintf(b, "\t\ttype %s hook %s priority %d; policy accept;\n", c.kind, c.hook, c.priority)
			fmt.Fprintf(b, "\t\tjump %s\n", c.jump)
			strangers--
		}
		for j, r := range c.rules {
			k := slices.IndexFunc(have.chains[c.name], func(n counted) bool { return n.id == r.id })
			if j == 0 || c.rules[j-1].why != r.why {
				fmt.Fprintf(b, "\t\t# %s\n", r.why)
			}
			if k < 0 {
				fmt.Fprintf(b, "\t\t# MISSING in the pod: %s\n", r.line("counter"))
				strangers++
				continue
			}
			n := have.chains[c.name][k]
			fmt.Fprintf(b, "\t\t%s comment %q\n", r.line(fmt.Sprintf("counter packets %d bytes %d", n.packets, n.bytes)), r.comment())
		}
		if strangers > 0 {
			fmt.Fprintf(b, "\t\t# and %d of somebody else's: see nft list table inet %s\n", strangers, t.name)
		}
		fmt.Fprintf(b, "\t}\n")
	}
	fmt.Fprintf(b, "}\n")
}

// printRoutes prints the policy rule and the route as comments: nft has no words
// for them.
func (p *pod) printRoutes(b *bytes.Buffer, f family) error {
	there, _, err := p.findRoute(f)
	if err != nil && !errors.Is(err, ErrTableInUse) {
		return err
	}
	ruled, _, err := p.findPolicyRule(f)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return err
	}
	missing := func(there bool) string {
		if there {
			return ""
		}
		return " (MISSING in the pod)"
	}
	routeThere := missing(there)
	ip, all := "ip", "0.0.0.0/0"
	if f.twin != "" {
		ip, all = "ip -6", "::/0"
		if p.no6 || p.off6 {
			routeThere = " (not there: IPv6 is disabled on lo)"
		}
	}
	if f.twin == "" {
		fmt.Fprintf(b, "\n# what rule 4 has marked is delivered in the pod, whatever its destination\n")
	}
	fmt.Fprintf(b, "# %s rule add pref %d fwmark %#x/%#x lookup %d%s\n", ip, RulePriority, RouteMark, MarkMask, RouteTable, missing(ruled))
	fmt.Fprintf(b, "# %s route add local %s dev lo table %d%s\n", ip, all, RouteTable, routeThere)
	return nil
}
