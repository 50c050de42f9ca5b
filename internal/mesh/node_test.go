package mesh

import (
	"testing"

	"ambient-emulator/internal/worldtest"
)

// node is a node agent and a ztunnel, in the pod of the latter.
type node struct {
	*worldtest.Node
	mesh   *mesh
	number int
	home   *pod
}

// node takes a pod for a ztunnel.
func (m *mesh) node(t *testing.T, on int) *node {
	t.Helper()
	home, ca := m.uncaptured(t, "ztunnel-"+nodeNames[on], on), testCA()
	home.node = &node{Node: worldtest.NewNode(t, home.NS), mesh: m, number: on, home: home}
	home.node.Env = append(home.node.Env, "NODE_NAME="+nodeNames[on])
	home.node.Args = []string{"--local-xds", m.configFile(), "--ca-cert", ca.certFile, "--ca-key", ca.keyFile}
	return home.node
}

// start starts the node's programs and makes its captured pods known to them.
func (n *node) start(t *testing.T) {
	t.Helper()
	n.Start(t, "--capture", "redirect")
	for _, p := range n.mesh.pods {
		if p.captured && p.node == n {
			n.Add(t, p.Place, "--service-account", p.account, "--uid", p.uid())
		}
	}
}

// del ends the pod.
func (n *node) del(t *testing.T, p *pod) {
	t.Helper()
	n.Del(t, p.Place, "--uid", p.uid())
}
