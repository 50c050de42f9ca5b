package redirect

import (
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// installed is a table of ours as the kernel has it: what each chain holds, with
// the numbers of our rules.
type installed struct {
	name   string
	chains map[string][]counted
}

// counted is a rule as the kernel has it.
type counted struct {
	id             string // "" if it is not ours
	packets, bytes uint64
}

// ownTables lists our tables that are there. With ErrForeign it says that one has
// our name but none of our rules.
func (p *pod) ownTables() (ours []installed, err error) {
	all, err := p.nft.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list the tables of nftables: %w", err)
	}
	all = slices.DeleteFunc(all, func(t *nftables.Table) bool {
		return t.Name != natTable && t.Name != mangleTable && t.Name != rawTable
	})
	if len(all) == 0 {
		return nil, nil
	}
	chains, err := p.nft.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list the chains of nftables: %w", err)
	}
	var foreign error
	for _, t := range all {
		in := installed{name: t.Name, chains: make(map[string][]counted)}
		known := false
		for _, c := range chains {
			if c.Table.Name != t.Name {
				continue
			}
			rules, err := p.nft.GetRules(t, c)
			if err != nil {
				return nil, fmt.Errorf("list the rules of chain %s of %s: %w", c.Name, t.Name, err)
			}
			for _, r := range rules {
				now := count(r)
				known = known || now.id != ""
				in.chains[c.Name] = append(in.chains[c.Name], now)
			}
		}
		if known {
			ours = append(ours, in)
		} else {
			foreign = fmt.Errorf("table inet %s: %w", t.Name, ErrForeign)
		}
	}
	return ours, foreign
}

// istioChains looks for the chains of istio-cni's other way, iptables, or of a
// sidecar's. Those that were made with iptables-legacy nftables does not show.
func (p *pod) istioChains() error {
	for _, f := range []family{v4(), v6()} {
		chains, err := p.nft.ListChainsOfTableFamily(nftables.TableFamily(f.nfproto))
		if err != nil {
			return fmt.Errorf("list the %s chains of nftables: %w", f.name, err)
		}
		for _, c := range chains {
			if strings.HasPrefix(c.Name, "ISTIO_") {
				return fmt.Errorf("chain %s of table %s %s: %w", c.Name, f.ip, c.Table.Name, ErrForeign)
			}
		}
	}
	return nil
}

func count(r *nftables.Rule) counted {
	id, _ := idOf(r.UserData)
	c := counted{id: id}
	for _, e := range r.Exprs {
		if counter, ok := e.(*expr.Counter); ok {
			c.packets, c.bytes = counter.Packets, counter.Bytes
		}
	}
	return c
}

// configOf tells from the numbers of the rules which configuration they are of.
func configOf(tables []installed) Config {
	c := Config{Mode: Redirect, BypassInbound: true}
	for _, t := range tables {
		for _, rules := range t.chains {
			for _, r := range rules {
				c.learn(r.id)
			}
		}
	}
	slices.Sort(c.VirtualInterfaces)
	return c
}

func (c *Config) learn(id string) {
	number, six := strings.CutSuffix(id, "/6")
	number, iface, _ := strings.Cut(number, " ")
	c.IPv6 = c.IPv6 || six
	switch number {
	case "T1":
		c.Mode = TProxy
	case "9":
		c.DNS = true
	case "7", "T6":
		c.BypassInbound = false
	case "5b":
		c.VirtualInterfaces = append(c.VirtualInterfaces, iface)
	}
}

// comment is what nft shows as comment "…": our name and the rule's number.
func (r rule) comment() string { return owner + r.id }
