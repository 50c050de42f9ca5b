// Package mesh tests pods that talk through the tunnel: whole programs, on the
// nodes and with the bytes of the real ztunnel's own tests, whose cases bear their
// names here (reference/localconfig.md, section 4.1: see namespaced_test.go).
//
// Each test has a world of its own, which scripts/world builds, so they run at the
// same time. The tests themselves are the applications, and who speaks HBONE
// without being ztunnel has code of his own, not ours: hbone_test.go.
package mesh

import (
	"net/netip"
	"testing"

	"ambient-emulator/internal/worldtest"
)

func TestMain(m *testing.M) { worldtest.Main(m, 8) }

// The nodes of each world, and what they are called in the configuration.
const (
	local  = 2
	remote = 3
)

var nodeNames = map[int]string{local: "node", remote: "remote-node"}

// podsPerNode is how many pods a node has at most, its ztunnel included.
const podsPerNode = 4

// mesh is a world, and what is configured in it.
type mesh struct {
	world *worldtest.World
	dir   string // of the configuration
	nodes map[int]*node
	pods  []*pod
	six   bool // its pods are known by their IPv6 addresses

	services, policies string // YAML, of the configuration
}

// newMesh builds a world. It ends with the private world of all tests.
func newMesh(t *testing.T) *mesh {
	t.Helper()
	t.Parallel()
	return &mesh{world: worldtest.Up(t, podsPerNode), dir: t.TempDir(), nodes: map[int]*node{}}
}

// newMesh6 is newMesh of IPv6.
func newMesh6(t *testing.T) *mesh {
	t.Helper()
	t.Parallel()
	return &mesh{world: worldtest.Up(t, podsPerNode, "--ipv6"), dir: t.TempDir(), nodes: map[int]*node{}, six: true}
}

// pod is a pod and what the configuration says of it.
type pod struct {
	*worldtest.Place
	six         bool
	node        *node
	account     string // its service account; by default its name
	captured    bool
	hbone       bool // speaks HBONE itself
	plain       bool // takes no tunnels, whoever serves it
	trustDomain string
	services    string   // YAML: what it serves
	more        []string // YAML: further keys
}

// ip is the address that the pod is known by, and At that with a port.
func (p *pod) ip() netip.Addr                { return p.IP(p.six) }
func (p *pod) At(port uint16) netip.AddrPort { return netip.AddrPortFrom(p.ip(), port) }

// identity is what the pod's certificate says.
func (p *pod) identity() string {
	return "spiffe://" + p.trustDomain + "/ns/default/sa/" + p.account
}

func (p *pod) uid() string { return "cluster1//v1/Pod/default/" + p.Name }

// uncaptured takes a pod of a node that has nothing to do with ztunnel.
func (m *mesh) uncaptured(t *testing.T, name string, on int) *pod {
	t.Helper()
	p := &pod{Place: m.world.Pod(t, on), six: m.six, account: name, trustDomain: "cluster.local", services: "{}"}
	p.Name = name
	m.pods = append(m.pods, p)
	return p
}

// pod takes a pod of a node whose traffic goes through ztunnel. With the first, the
// node gets a pod for ztunnel itself.
func (m *mesh) pod(t *testing.T, name string, on int) *pod {
	t.Helper()
	if m.nodes[on] == nil {
		m.nodes[on] = m.node(t, on)
	}
	p := m.uncaptured(t, name, on)
	p.node, p.captured = m.nodes[on], true
	return p
}
