package mesh

import (
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// dedicated takes a pod of a node that shall have a ztunnel of its own: the pod's
// application is in the ztunnel's network namespace, and no agent is needed.
func (m *mesh) dedicated(t *testing.T, on int) *pod {
	t.Helper()
	n := &node{mesh: m, number: on, program: filepath.Join(bin, "ztunnel-emulator")}
	n.env = []string{"PROXY_MODE=dedicated", "NODE_NAME=" + nodeNames[on], "CONNECTION_TERMINATION_DEADLINE=50ms"}
	n.home = m.uncaptured(t, "ztunnel-"+nodeNames[on], on)
	n.env = append(n.env, "PROXY_WORKLOAD_INFO=default/"+n.home.name+"/"+n.home.name)
	n.home.node = n
	return n.home
}

// startDedicated starts the ztunnel of a pod, by way of words if there are any. It
// ends, well, with the test.
func (p *pod) startDedicated(t *testing.T, words ...string) {
	t.Helper()
	n, ca := p.node, testCA()
	words = slices.Concat(words, []string{n.program, "--local-xds", n.mesh.configFile(), "--ca-cert", ca.certFile, "--ca-key", ca.keyFile})
	n.zt = start(t, p.NS, n.env, words[0], words[1:]...)
	n.zt.says(t, "\tpod served\t")
	t.Cleanup(func() { n.zt.end(t, unix.SIGTERM) })
}

// dedicatedOutbound is a dedicated ztunnel as the real cases have it, of a workload
// without tunnels, whose outbound traffic alone is captured.
func (m *mesh) dedicatedOutbound(t *testing.T, on int) *pod {
	t.Helper()
	p := m.dedicated(t, on)
	p.plain = true
	p.node.env = append(p.node.env, "PACKET_MARK=1337", "ENABLE_ORIG_SRC=false")
	p.run(t, "nft", `table inet dedicated {
		chain output {
			type nat hook output priority -100
			oifname != "lo" meta l4proto tcp meta mark & 0xfff != 0x539 redirect to :15001
		}
	}`)
	return p
}

func serverUncapturedDedicated(t *testing.T) {
	m := newMesh(t)
	client, server := m.dedicatedOutbound(t, local), m.uncaptured(t, "server", remote)
	m.write(t, m.config())
	client.startDedicated(t)
	server.echoTwice(t)
	client.request(t, server.at(8080), hello+hello)
	client.node.says(t, access{src: client, dst: server, addr: server.at(8080), sent: 11, recv: 22})
}

func crossNodeCapturedDedicated(t *testing.T) {
	m := newMesh(t)
	client, server := m.dedicatedOutbound(t, local), m.dedicatedOutbound(t, remote)
	m.write(t, m.config())
	client.startDedicated(t)
	server.startDedicated(t)
	server.echoTwice(t)
	client.request(t, server.at(8080), hello+hello)
	client.node.says(t, access{src: client, dst: server, addr: server.at(8080), sent: 11, recv: 22})
	server.node.says(t)
}

// Beyond the real cases: a dedicated ztunnel carries tunnels, in both directions, and
// what it only receives takes no capability.
func TestDedicated(t *testing.T) {
	m := newMesh(t)
	client, server := m.dedicated(t, local), m.dedicated(t, remote)
	client.node.env = append(client.node.env, "PACKET_MARK=1337")
	m.write(t, m.config())
	client.startDedicated(t)
	server.startDedicated(t, "setpriv", "--bounding-set=-all", "--inh-caps=-all")
	server.echoTwice(t)
	cni(t, "rules", "install", "--netns", client.path)
	client.request(t, server.at(8080), hello+hello)
	out, in := direct(client, server)
	client.node.says(t, out)
	server.node.says(t, in)
}
