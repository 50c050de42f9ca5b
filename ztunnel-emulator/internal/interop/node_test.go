package interop

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"ambient-emulator/internal/netns/netnstest"
)

// node is a node agent and a ztunnel, in a network namespace of their own. Where
// that is does not matter: a pod is where its descriptor says.
type node struct {
	dir       string
	ca        *ca
	env       []string // of ztunnel
	program   string   // ztunnel
	workloads []*pod   // of the configuration
	policies  string   // YAML
	agent, zt *process
}

// newNode is a node to be started, whose configuration knows these pods.
func newNode(t *testing.T, workloads ...*pod) *node {
	t.Helper()
	return &node{
		dir: t.TempDir(), ca: newCA(t), program: filepath.Join(bin, "ztunnel-emulator"), policies: "[]", workloads: workloads,
		env: []string{"NODE_NAME=node2", "CONNECTION_TERMINATION_DEADLINE=50ms"},
	}
}

// useFast takes a ztunnel without the race detector.
func (n *node) useFast(yes bool) {
	if yes {
		n.program = filepath.Join(bin, "fast", "ztunnel-emulator")
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
`, p.name, p.ip)
	}
	b.WriteString("services:\n")
	for i, p := range n.workloads {
		fmt.Fprintf(&b, `- name: %s
  namespace: default
  hostname: %[1]s.default.svc.cluster.local
  vips: [/%v]
  ports: {80: 8080}
`, p.name, n.vip(i))
	}
	return b.String() + "policies: " + n.policies + "\n"
}

// vip is the address of the service that is the workload of that number.
func (n *node) vip(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 96, 0, byte(10 + i)}) }

// start starts an agent and a ztunnel, and makes these pods theirs. They end, well,
// with the test.
func (n *node) start(t *testing.T, pods ...*pod) {
	t.Helper()
	home := netnstest.New(t)
	zds, control, xds := filepath.Join(n.dir, "zds.sock"), filepath.Join(n.dir, "control.sock"), filepath.Join(n.dir, "mesh.yaml")
	must(t, os.WriteFile(xds, []byte(n.config()), 0o644))
	n.agent = start(t, home, nil, filepath.Join(bin, "cni-emulator"), "serve", "--capture", "redirect", "--zds-uds", zds, "--control-uds", control)
	t.Cleanup(func() { n.agent.end(t) })
	waitFor(t, "agent", func() bool { return exists(control) && exists(zds) })
	n.zt = start(t, home, n.env, n.program, "--inpod-uds", zds, "--local-xds", xds, "--ca-cert", n.ca.root(), "--ca-key", filepath.Join(n.ca.dir, "key.pem"))
	t.Cleanup(func() { n.zt.end(t) })
	n.zt.says(t, "\tready\t")
	for _, p := range pods {
		if out, err := exec.Command(filepath.Join(bin, "cni-emulator"), "add", p.name, "--netns", p.path, "--service-account", p.name, "--control-uds", control).CombinedOutput(); err != nil {
			t.Fatalf("add %s: %v: %s", p.name, err, out)
		}
	}
}
