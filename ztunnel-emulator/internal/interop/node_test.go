package interop

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"ambient-emulator/internal/netns/netnstest"
	"ambient-emulator/internal/worldtest"
)

// node is a node agent and a ztunnel, in a network namespace of their own.
type node struct {
	*worldtest.Node
	ca        *ca
	workloads []*worldtest.Place // of the configuration
	policies  string             // YAML
}

// newNode is a node to be started, whose configuration knows these pods.
func newNode(t *testing.T, workloads ...*worldtest.Place) *node {
	t.Helper()
	n := &node{Node: worldtest.NewNode(t, netnstest.New(t)), ca: newCA(t), workloads: workloads, policies: "[]"}
	n.Env = append(n.Env, "NODE_NAME=node2")
	return n
}

// useFast takes a ztunnel without the race detector.
func (n *node) useFast(yes bool) {
	if yes {
		n.Program = worldtest.FastZtunnel
	}
}

func (n *node) config() string {
	var b strings.Builder
	b.WriteString("workloads:\n")
	for _, p := range n.workloads {
		fmt.Fprintf(&b, `- uid: Kubernetes//v1/Pod/default/%s
  name: %[1]s
  namespace: default
  serviceAccount: %[1]s
  trustDomain: cluster.local
  clusterId: Kubernetes
  workloadIps: ["%[2]v"]
  protocol: HBONE
  node: node2
  workloadName: %[1]s-deployed
  workloadType: deployment
  canonicalName: %[1]s-app
  canonicalRevision: v1
  services: {default/%[1]s.default.svc.cluster.local: {80: 8080}}
`, p.Name, p.IP4)
	}
	b.WriteString("services:\n")
	for i, p := range n.workloads {
		fmt.Fprintf(&b, `- name: %s
  namespace: default
  hostname: %[1]s.default.svc.cluster.local
  vips: [/%v]
  ports: {80: 8080}
`, p.Name, n.vip(i))
	}
	return b.String() + "policies: " + n.policies + "\n"
}

// vip is the address of the service that is the workload of that number.
func (n *node) vip(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 96, 0, byte(10 + i)}) }

// start starts an agent and a ztunnel, and makes these pods theirs. They end, well,
// with the test.
func (n *node) start(t *testing.T, pods ...*worldtest.Place) {
	t.Helper()
	n.Args = []string{"--local-xds", n.ca.write(t, "mesh.yaml", []byte(n.config())), "--ca-cert", n.ca.root(), "--ca-key", filepath.Join(n.ca.dir, "key.pem")}
	n.Start(t, "--capture", "redirect")
	for _, p := range pods {
		n.Add(t, p, "--service-account", p.Name)
	}
}
