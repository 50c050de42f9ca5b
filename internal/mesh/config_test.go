package mesh

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ambient-emulator/internal/worldtest"
)

func (m *mesh) configFile() string { return filepath.Join(m.dir, "mesh.yaml") }

// config is the whole configuration. All nodes of the mesh have the same.
func (m *mesh) config() string {
	var b strings.Builder
	b.WriteString("workloads:\n")
	for _, p := range m.pods {
		protocol := "TCP"
		if (p.node != nil || p.hbone) && !p.plain {
			protocol = "HBONE"
		}
		fmt.Fprintf(&b, `- uid: %s
  name: %s
  namespace: default
  serviceAccount: %[8]s
  trustDomain: %[3]s
  clusterId: Kubernetes
  workloadIps: ["%[4]v"]
  protocol: %[5]s
  node: %[6]s
  workloadName: %[2]s
  workloadType: deployment
  canonicalName: %[2]s
  services: %[7]s
`, p.uid(), p.Name, p.trustDomain, p.ip(), protocol, nodeNames[int(p.IP4.As4()[2])], p.services, p.account)
		for _, key := range p.more {
			fmt.Fprintf(&b, "  %s\n", key)
		}
	}
	fmt.Fprintf(&b, "services:%s\npolicies:%s\n", or(m.services, " []"), or(m.policies, " []"))
	return b.String()
}

func or(s, other string) string {
	if s == "" {
		return other
	}
	return "\n" + strings.Trim(s, "\n")
}

// service is one that is found at a VIP, "" for none.
func service(name, vip, ports string) string {
	vips := "[]"
	if vip != "" {
		vips = `["/` + vip + `"]`
	}
	return fmt.Sprintf(`
- name: %s
  namespace: default
  hostname: %s
  vips: %s
  ports: %s`, name, hostname(name), vips, ports)
}

func hostname(service string) string { return service + ".default.svc.cluster.local" }

// allow and deny are policies of the whole namespace about one principal.
func allow(name, principal string) string { return policy(name, "Allow", principal) }
func deny(name, principal string) string  { return policy(name, "Deny", principal) }

func policy(name, action, principal string) string {
	return fmt.Sprintf(`
- name: %s
  namespace: default
  scope: Namespace
  action: %s
  dryRun: false
  rules:
  - - - principals: [!Exact %q]`, name, action, strings.TrimPrefix(principal, "spiffe://"))
}

// write puts a configuration in the place of the one before.
func (m *mesh) write(t *testing.T, text string) {
	t.Helper()
	next := m.configFile() + ".next"
	if err := os.WriteFile(next, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, m.configFile()); err != nil {
		t.Fatal(err)
	}
}

// rewrite writes the configuration anew, and waits until all nodes go by it.
func (m *mesh) rewrite(t *testing.T) {
	t.Helper()
	const taken = "the new configuration is in force"
	before := map[*node]int{}
	for _, n := range m.nodes {
		before[n] = strings.Count(n.ZT.Log(), taken)
	}
	m.write(t, m.config())
	for n, count := range before {
		worldtest.WaitFor(t, taken, func() bool { return strings.Count(n.ZT.Log(), taken) > count })
	}
}

// start writes the configuration, and starts an agent and a ztunnel on each node
// that has captured pods. They end, well, with the test.
func (m *mesh) start(t *testing.T) {
	t.Helper()
	m.write(t, m.config())
	for _, on := range []int{local, remote} {
		if n := m.nodes[on]; n != nil {
			n.start(t)
		}
	}
}
