package redirect

import "github.com/google/nftables"

// The tables and chains have the real agent's names, so that what one knows of
// the one is true of the other.
const (
	natTable    = "istio-ambient-nat"
	mangleTable = "istio-ambient-mangle"
	rawTable    = "istio-ambient-raw"
)

// table is a table of family inet with its chains in order.
type table struct {
	name   string
	chains []chain
}

// chain is a base chain, which does nothing but jump, or a chain with rules.
type chain struct {
	name     string
	kind     nftables.ChainType // of a base chain
	hook     string
	priority int
	jump     string
	rules    []rule
}

// tables is all of a configuration, in the order of the real agent's.
func (c Config) tables() []table {
	tables := []table{
		newTable(natTable, nftables.ChainTypeNAT, nftables.ChainTypeNAT, -100, c.natPrerouting(), c.natOutput()),
		newTable(mangleTable, nftables.ChainTypeFilter, nftables.ChainTypeRoute, -150, c.manglePrerouting(), c.mangleOutput()),
	}
	if c.DNS {
		tables = append(tables, newTable(rawTable, nftables.ChainTypeFilter, nftables.ChainTypeFilter, -300, c.rawPrerouting(), c.rawOutput()))
	}
	return tables
}

// newTable leaves out a direction that has no rules.
func newTable(name string, prerouting, output nftables.ChainType, priority int, in, out []rule) table {
	t := table{name: name}
	for _, c := range []chain{
		{name: "prerouting", kind: prerouting, hook: "prerouting", priority: priority, jump: "istio-prerouting", rules: in},
		{name: "output", kind: output, hook: "output", priority: priority, jump: "istio-output", rules: out},
		{name: "istio-prerouting", rules: in},
		{name: "istio-output", rules: out},
	} {
		if len(c.rules) == 0 {
			continue
		}
		if c.jump != "" {
			c.rules = nil
		}
		t.chains = append(t.chains, c)
	}
	return t
}
