package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns/netnstest"
)

// Rules of somebody else's that were made with iptables stay as they are, and do
// what they did.
func TestBesideIptables(t *testing.T) {
	w := newWorld(t)
	c := Config{Mode: Redirect, DNS: true, IPv6: true}
	for _, f := range c.families() {
		w.people(f, c)
		restore := "iptables-restore"
		if f.twin != "" {
			restore = "ip6tables-restore"
		}
		inside(t, w.p, iptablesRules, restore)
	}
	saved := func() (all string) {
		for _, save := range []string{"iptables-save", "ip6tables-save"} {
			for line := range strings.Lines(inside(t, w.p, "", save)) {
				if !strings.HasPrefix(line, "#") { // with a date
					all += counters.ReplaceAllString(line, "")
				}
			}
		}
		return all
	}
	rules := saved()
	for _, mode := range []Mode{Redirect, TProxy} {
		c.Mode = mode
		before := state(t, w.p) // with the counters
		install(t, w.p, c)
		remove(t, w.p)
		same(t, "after", state(t, w.p), before)
		install(t, w.p, c)
		same(t, "as iptables sees it", saved(), rules)
		if mode == Redirect {
			for _, f := range c.families() {
				a := addressesOf(f)
				at := netip.AddrPortFrom
				w.check(t, []row{
					{f.name + ": captured", 'R', socketOf{kind: unix.SOCK_STREAM}, at(a.pod, appPort), fmt.Sprintf("15006 peer=%v local=%v dst=%v", a.remote, at(a.pod, InboundPort), at(a.pod, appPort))},
					{f.name + ": sent, and captured", 'P', socketOf{kind: unix.SOCK_STREAM}, at(a.remote, 9000), fmt.Sprintf("15001 peer=%v local=%v dst=%v", a.pod, at(a.loopback, OutboundPort), at(a.remote, 9000))},
					{f.name + ": to the application as R", 'P', socketOf{kind: unix.SOCK_STREAM, mark: ProxyMark, transparent: true, bind: at(a.remote, 0)}, at(a.pod, appPort), fmt.Sprintf("app peer=%v local=%v dst=%v", a.remote, at(a.pod, appPort), at(a.pod, appPort))},
					{f.name + ": what they drop", 'R', socketOf{kind: unix.SOCK_DGRAM}, at(a.pod, 7000), ""},
				})
			}
		}
		remove(t, w.p)
		same(t, "after, as iptables sees it", saved(), rules)
	}
}

var counters = regexp.MustCompile(`\[\d+:\d+\]`)

// iptablesRules drop some, translate a port, hide a guest, and mark in the higher
// bits all that comes in.
const iptablesRules = `*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:SOMEBODYS - [0:0]
-A INPUT -p udp -m udp --dport 7000 -j SOMEBODYS
-A SOMEBODYS -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -p udp -m udp --dport 7001 -j REDIRECT --to-ports 7000
-A POSTROUTING -o tap0 -j MASQUERADE
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -p tcp -j MARK --set-xmark 0x70000/0x70000
COMMIT
`

// A pod that istio-cni has captured with iptables, or that has a sidecar, is left
// alone: two captures would fight for each connection.
func TestForeignIptables(t *testing.T) {
	for _, tables := range []string{
		"*mangle\n:ISTIO_PRERT - [0:0]\n-A PREROUTING -j ISTIO_PRERT\nCOMMIT\n",
		"*nat\n:ISTIO_REDIRECT - [0:0]\n-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001\nCOMMIT\n",
	} {
		for _, restore := range []string{"iptables-restore", "ip6tables-restore"} {
			ns := netnstest.New(t)
			inside(t, ns, tables, restore)
			before := state(t, ns)
			if _, err := Install(ns, Config{Mode: Redirect}); !errors.Is(err, ErrForeign) || !strings.Contains(fmt.Sprint(err), "ISTIO_") {
				t.Errorf("%s %q: %v", restore, tables, err)
			}
			if text, err := Show(ns); err != nil || !strings.Contains(text, "ISTIO_") {
				t.Errorf("show: %v: %s", err, text)
			}
			remove(t, ns)
			same(t, "after", state(t, ns), before)
		}
	}
}
