package redirect

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"

	"ambient-emulator/internal/netns"
)

// owner begins the comment of each of our rules; the rule's number follows. It
// tells our tables from istio-cni's own, which have the same names.
const owner = "ambient-emulator "

// Report is what a person should know of an installation.
type Report struct {
	// Open is how many connections the pod had with others. The kernel sees them
	// for the first time now, in their middle, and resets them.
	Open int
}

// Install captures a pod's traffic, or captures it anew in another way. The same
// again changes nothing. On error nothing is left behind that was not there.
//
// ns stays the caller's. Install needs CAP_SYS_ADMIN to enter it and CAP_NET_ADMIN.
func Install(ns *netns.NS, c Config) (Report, error) {
	if err := c.Check(); err != nil {
		return Report{}, err
	}
	p, err := open(ns)
	if err != nil {
		return Report{}, err
	}
	defer p.close()
	report, err := p.install(c)
	if err != nil {
		return Report{}, fmt.Errorf("capture %v with %s: %w", p.id, c.Mode, p.explain(err, c.features()))
	}
	return report, nil
}

// install does the harmless things first: nothing looks at the route until the
// rules mark a packet. The rules come in one transaction, whole or not at all.
func (p *pod) install(c Config) (report Report, err error) {
	// Somebody's tables or sockets in the way: nothing is touched.
	ours, err := p.ownTables()
	if err == nil && len(ours) == 0 {
		err = p.istioChains()
	}
	if err != nil {
		return Report{}, err
	}
	s, err := p.sockets()
	if err != nil {
		return Report{}, err
	}
	if err := s.reachable(c); err != nil {
		return Report{}, err
	}
	if len(ours) == 0 {
		report.Open = s.open
	}

	undo, err := p.addRoutes(c)
	if err == nil {
		p.replaceTables(ours, c.tables())
		err = p.nft.Flush()
	}
	if err != nil {
		return Report{}, errors.Join(err, undo())
	}
	if err := p.dropSurplusRoutes(c); err != nil {
		return Report{}, err
	}
	return report, nil
}

// Remove takes out of a pod what Install has put in, and nothing else; if there
// is nothing, it does nothing. ns stays the caller's.
func Remove(ns *netns.NS) error {
	p, err := open(ns)
	if err != nil {
		return err
	}
	defer p.close()
	if err := p.remove(); err != nil {
		return fmt.Errorf("remove the rules from %v: %w", p.id, p.explain(err, basics()))
	}
	return nil
}

// remove ends the capture first: a mark without its route would lose packets.
func (p *pod) remove() error {
	ours, err := p.ownTables()
	if err != nil && !errors.Is(err, ErrForeign) {
		return err
	}
	for _, t := range ours {
		p.nft.DelTable(tableOf(t.name))
	}
	if err := p.nft.Flush(); err != nil {
		return fmt.Errorf("delete the tables: %w", err)
	}
	return p.delRoutes(func(family) bool { return true })
}

// replaceTables queues one transaction. A table that is there is deleted, not only
// flushed: in another mode the same chain may be of another type. What the new
// configuration does not have goes, too. (The real agent leaves the raw table
// behind when DNS capture ends.)
func (p *pod) replaceTables(old []installed, tables []table) {
	for _, t := range old {
		p.nft.DelTable(tableOf(t.name))
	}
	for _, t := range tables {
		nt := p.nft.AddTable(tableOf(t.name))
		for _, c := range t.chains {
			p.nft.AddChain(chainOf(nt, c))
		}
		for _, c := range t.chains {
			nc := &nftables.Chain{Name: c.name, Table: nt}
			if c.jump != "" {
				p.nft.AddRule(&nftables.Rule{Table: nt, Chain: nc, Exprs: jumpTo(c.jump)})
			}
			for _, r := range c.rules {
				p.nft.AddRule(&nftables.Rule{Table: nt, Chain: nc, Exprs: r.compile(), UserData: userdata.AppendString(nil, userdata.TypeComment, r.comment())})
			}
		}
	}
}

func jumpTo(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

func tableOf(name string) *nftables.Table {
	return &nftables.Table{Name: name, Family: nftables.TableFamilyINet}
}

func chainOf(t *nftables.Table, c chain) *nftables.Chain {
	nc := &nftables.Chain{Name: c.name, Table: t}
	if c.jump == "" {
		return nc
	}
	hook, policy := nftables.ChainHookPrerouting, nftables.ChainPolicyAccept
	if c.hook == "output" {
		hook = nftables.ChainHookOutput
	}
	nc.Type, nc.Hooknum, nc.Policy = c.kind, hook, &policy
	nc.Priority = nftables.ChainPriorityRef(nftables.ChainPriority(c.priority))
	return nc
}

// idOf reads a rule's number from its comment: the kernel keeps whatever bytes
// somebody gave it, each piece with a type and a length in front.
func idOf(data []byte) (id string, ok bool) {
	for len(data) >= 2 && len(data) >= 2+int(data[1]) {
		kind, value := data[0], data[2:2+int(data[1])]
		if kind == byte(userdata.TypeComment) {
			return strings.CutPrefix(strings.TrimSuffix(string(value), "\x00"), owner)
		}
		data = data[2+int(data[1]):]
	}
	return "", false
}
