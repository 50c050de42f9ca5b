package redirect

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/netns/netnstest"
)

func install(t *testing.T, ns *netns.NS, c Config) {
	t.Helper()
	if _, err := Install(ns, c); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, ns *netns.NS) {
	t.Helper()
	if err := Remove(ns); err != nil {
		t.Fatal(err)
	}
}

func same(t *testing.T, what, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(g), len(w)) {
		if g[i] != w[i] {
			t.Fatalf("%s: line %d is\n%s\nand not\n%s", what, i, g[i], w[i])
		}
	}
	t.Fatalf("%s: %d lines and not %d:\n%s", what, len(g), len(w), got)
}

// inside runs a command in the pod.
func inside(t *testing.T, ns *netns.NS, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command("nsenter", append([]string{"--net=/proc/self/fd/3", name}, args...)...)
	f := os.NewFile(uintptr(netnstest.DupFD(t, ns)), "netns")
	defer f.Close()
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stdin = strings.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, &stderr)
	}
	return string(out)
}

// state is all that a pod has of rules and routes, but for the numbers that the
// kernel gives to rules anew.
func state(t *testing.T, ns *netns.NS) string {
	t.Helper()
	var b strings.Builder
	for _, args := range [][]string{{"-4", "rule"}, {"-6", "rule"}, {"-4", "route", "show", "table", "all"}, {"-6", "route", "show", "table", "all"}, {"-o", "address"}} {
		fmt.Fprintf(&b, "%v:\n%s", args, inside(t, ns, "", "ip", args...))
	}
	if _, err := exec.LookPath("nft"); err == nil {
		out := inside(t, ns, "", "nft", "-j", "list", "ruleset")
		out = regexp.MustCompile(`"handle": \d+`).ReplaceAllString(out, `"handle": 0`)
		b.WriteString(strings.ReplaceAll(out, `{"chain"`, "\n"+`{"chain"`) + "\n")
	}
	p, err := open(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	chains, err := p.nft.ListChains()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := p.nft.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, table := range tables {
		lines = append(lines, fmt.Sprintf("%d %s %d", table.Family, table.Name, table.Use))
	}
	for _, c := range chains {
		rules, err := p.nft.GetRules(c.Table, c)
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range rules {
			exprs, err := json.Marshal(r.Exprs)
			if err != nil {
				t.Fatal(err)
			}
			lines = append(lines, fmt.Sprintf("%s %s %d: %s %q", c.Table.Name, c.Name, i, exprs, r.UserData))
		}
	}
	slices.Sort(lines)
	b.WriteString(strings.Join(lines, "\n"))
	return b.String()
}

// somebodyElse puts a table, a rule and routes into a pod that are not ours.
func somebodyElse(t *testing.T, ns *netns.NS) {
	t.Helper()
	p, err := open(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	table := p.nft.AddTable(tableOf("somebody-elses"))
	c := p.nft.AddChain(chainOf(table, chain{name: "output", kind: nftables.ChainTypeNAT, hook: "output", priority: -90, jump: "-"}))
	p.nft.AddRule(&nftables.Rule{Table: table, Chain: c, Exprs: rule{match: []part{dport(unix.IPPROTO_UDP, 7)}, then: []part{accept()}}.compile()})
	p.nft.AddTable(&nftables.Table{Name: natTable, Family: nftables.TableFamilyIPv4}) // our name, another family
	if err := p.nft.Flush(); err != nil {
		t.Fatal(err)
	}
	r := v4().route()
	r.Table, r.Protocol = 99, unix.RTPROT_STATIC
	q := v4().policyRule()
	q.Table, q.Mark, q.Protocol = 99, 7, unix.RTPROT_STATIC
	if err := errors.Join(p.links.RouteAdd(r), p.links.RuleAdd(q)); err != nil {
		t.Fatal(err)
	}
}
