package redirect

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// Answer is what is known of something that a kernel may have.
type Answer int

// The three answers.
const (
	Unknown Answer = iota
	Works
	Absent // proven
)

func (a Answer) String() string { return [...]string{"cannot tell", "works", "proven absent"}[a] }

// feature is something that a kernel may be built without. ask asks for it by the
// harmless version of the real thing.
type feature struct {
	name, config string
	ask          func(*pod) error
}

// basics are what every configuration needs.
func basics() []feature { return Config{Mode: Redirect}.features() }

// features lists what a configuration needs.
func (c Config) features() []feature {
	filter := chain{name: "c", kind: nftables.ChainTypeFilter, hook: "prerouting", priority: -150, jump: "-"}
	route := chain{name: "c", kind: nftables.ChainTypeRoute, hook: "output", priority: -150, jump: "-"}
	nat := chain{name: "c", kind: nftables.ChainTypeNAT, hook: "output", priority: -100, jump: "-"}
	list := []feature{
		{"tables of family inet", "CONFIG_NF_TABLES_INET", try(filter, rule{then: []part{accept()}})},
		{"chains of type route", "CONFIG_NF_TABLES_INET", try(route, rule{then: []part{accept()}})},
		{"NAT in family inet (Linux 5.2)", "CONFIG_NFT_NAT", try(nat, rule{then: []part{accept()}})},
		{"redirect", "CONFIG_NFT_REDIR", try(nat, rule{match: []part{tcp()}, then: []part{redirectTo(OutboundPort)}})},
		{"connection marks", "CONFIG_NFT_CT and CONFIG_NF_CONNTRACK_MARK", try(filter, rule{then: []part{setCtMark(RouteMark)}})},
		{"policy routing", "CONFIG_IP_MULTIPLE_TABLES", policyRouting(v4())},
	}
	if c.IPv6 {
		list = append(list, feature{"policy routing of IPv6", "CONFIG_IPV6_MULTIPLE_TABLES", policyRouting(v6())})
	}
	if c.DNS {
		list = append(list,
			feature{"conntrack zones", "CONFIG_NFT_CT and CONFIG_NF_CONNTRACK_ZONES", try(filter, rule{then: []part{setZone(dnsZone)}})},
			feature{"matching the socket of a packet", "CONFIG_NFT_SOCKET", try(filter, rule{match: []part{socketMark(ProxyMark)}, then: []part{accept()}})})
	}
	if c.Mode == TProxy {
		list = append(list,
			feature{"tproxy", "CONFIG_NFT_TPROXY", try(filter, rule{match: []part{tcp()}, then: v4().deliver(InboundPort)})},
			feature{"reject at prerouting (Linux 5.9)", "CONFIG_NFT_REJECT", try(filter, rule{match: []part{tcp()}, then: []part{reset()}})})
	}
	return list
}

// try asks for a rule in a base chain: a table that is deleted in the transaction
// that makes it.
func try(base chain, r rule) func(*pod) error {
	return func(p *pod) error {
		t := p.nft.AddTable(tableOf(fmt.Sprintf("ambient-probe-%d", os.Getpid())))
		c := p.nft.AddChain(chainOf(t, base))
		p.nft.AddRule(&nftables.Rule{Table: t, Chain: c, Exprs: r.compile()})
		p.nft.DelTable(t)
		return p.nft.Flush()
	}
}

// policyRouting looks at the family's policy rules, of which every kernel that can
// have some has some.
func policyRouting(f family) func(*pod) error {
	return func(p *pod) error {
		if f.af() == unix.AF_INET6 && p.no6 {
			return nil // nobody will ask
		}
		_, err := p.links.RuleList(f.af())
		return err
	}
}

// judge reads the kernel's answer to a probe. What it does not know it calls
// ENOENT, after having looked for a module, or EOPNOTSUPP; a kind of socket or of
// policy rule has errors of its own.
func judge(err error) Answer {
	switch {
	case err == nil:
		return Works
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		return Absent
	}
	return Unknown
}

// explain looks for the reason of a failure that the kernel gave a mere number
// for: is it something that this kernel lacks?
func (p *pod) explain(err error, needs []feature) error {
	var errno unix.Errno
	if !errors.As(err, &errno) || errors.Is(err, unix.EPERM) {
		return lacks(err, "CAP_NET_ADMIN")
	}
	var absent, unknown []string
	for _, f := range needs {
		why := f.ask(p)
		switch judge(why) {
		case Absent:
			absent = append(absent, fmt.Sprintf("%s (%s)", f.name, f.config))
		case Unknown:
			unknown = append(unknown, fmt.Sprintf("%s (%v)", f.name, why))
		}
	}
	switch {
	case len(absent) > 0:
		return fmt.Errorf("%w: %v in this kernel: %s", err, Absent, strings.Join(absent, ", "))
	case len(unknown) > 0:
		return fmt.Errorf("%w: %v whether this kernel has: %s", err, Unknown, strings.Join(unknown, ", "))
	}
	return fmt.Errorf("%w, though the kernel has all that is needed", err)
}

// Able tells at once whether this process may capture pods at all, by the harmless
// version of the real thing: it visits the namespace that it is in, and looks at
// the tables there, which needs the same as writing them.
func Able() error {
	home, err := netns.Home()
	if err != nil {
		return err
	}
	p, err := open(home)
	if err != nil {
		return err
	}
	defer p.close()
	if _, err := p.nft.ListTables(); err != nil {
		return p.explain(fmt.Errorf("list the tables of nftables: %w", err), basics())
	}
	return nil
}

// lacks names the capability that a refused step needs, and the command that
// grants what all steps need.
func lacks(err error, capability string) error {
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	exe, exeErr := os.Executable()
	if exeErr != nil {
		exe = "PATH/TO/cni-emulator"
	}
	return fmt.Errorf("%w: it needs %s, %w: run it with sudo, or once: sudo setcap cap_sys_admin,cap_net_admin+ep %s", err, capability, ErrCapability, exe)
}
