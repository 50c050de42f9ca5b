// Package capture tests pods whose traffic goes through ztunnel without their
// knowing: whole processes in a world that scripts/world builds, with the tests
// themselves as the applications.
//
// There is one world with many pods. A test takes pods of its own, and starts an
// agent and a ztunnel of its own for them; so most tests run at the same time.
package capture

import (
	"net/netip"
	"testing"

	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/worldtest"
)

func TestMain(m *testing.M) { worldtest.Main(m, 8) }

// world has enough pods for all tests here: none is used twice.
var world = worldtest.Shared(100, "--ipv6")

// pod takes a pod of a node, 2 or 3, that nobody else has.
func pod(t *testing.T, node int) *worldtest.Place {
	t.Helper()
	return world(t).Pod(t, node)
}

// at is one of a pod's addresses with a port.
func at(p *worldtest.Place, six bool, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(p.IP(six), port)
}

// newNode starts an agent and a ztunnel, in a network namespace of their own, with
// settings that are not the usual ones.
func newNode(t *testing.T, settings ...func(*worldtest.Node)) *worldtest.Node {
	t.Helper()
	n := worldtest.NewNode(t, netnstest.New(t))
	for _, set := range settings {
		set(n)
	}
	n.Start(t)
	return n
}

func withEnv(env ...string) func(*worldtest.Node) {
	return func(n *worldtest.Node) { n.Env = append(n.Env, env...) }
}

func fast(n *worldtest.Node) { n.Program = worldtest.FastZtunnel }

// forms are the two forms of rules.
var forms = []string{"redirect", "tproxy"}

// family names a family in the name of a test.
func family(six bool) string {
	if six {
		return "IPv6"
	}
	return "IPv4"
}

// eachWay runs f for both forms of rules, with IPv4 and IPv6.
func eachWay(t *testing.T, f func(t *testing.T, form string, six bool)) {
	for _, form := range forms {
		for _, six := range []bool{false, true} {
			t.Run(form+"/"+family(six), func(t *testing.T) {
				t.Parallel()
				f(t, form, six)
			})
		}
	}
}
