package mesh

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"ambient-emulator/internal/worldtest"
)

const (
	rejected     = "connection closed due to policy rejection: "
	noneAllowed  = rejected + "allow policies exist, but none allowed"
	policyChange = "connection closed due to policy change"
)

// policyRejects: only somebody else is allowed.
func policyRejects(t *testing.T) {
	m := newMesh(t)
	client, server := m.uncaptured(t, "client", remote), m.pod(t, "server", local)
	m.policies = allow("only-another", "cluster.local/ns/default/sa/another")
	m.start(t)
	server.echoTwice(t)
	n := client.dialTunnel(t, server)
	if status, _ := n.connect(t, 1, server.At(8080).String()); status != "401" {
		t.Errorf("CONNECT is answered with %s, want 401", status)
	}
	_, in := direct(client, server)
	in.sent, in.recv, in.err = 0, 0, noneAllowed
	server.node.says(t, in)
}

// The same between two ztunnels, by a policy that denies; and by its name.
func TestPolicyDenies(t *testing.T) {
	m := newMesh(t)
	client, other, server := m.pod(t, "client", local), m.pod(t, "other", local), m.pod(t, "server", remote)
	m.policies = deny("no-client", client.identity())
	m.start(t)
	server.echoTwice(t)
	client.isRefused(t, server.At(8080))
	other.request(t, server.At(8080), hello+hello)

	out, in := direct(client, server)
	out.sent, out.recv, out.err = 0, 0, "http status: 401 Unauthorized"
	in.sent, in.recv, in.err = 0, 0, rejected+"explicitly denied by: default/no-client"
	otherOut, otherIn := direct(other, server)
	client.node.says(t, out, otherOut)
	server.node.says(t, in, otherIn)
}

// Strict mutual TLS is a policy, as istiod makes it of a PeerAuthentication: who has
// no identity stays outside.
func TestStrict(t *testing.T) {
	m := newMesh(t)
	client, plain := m.pod(t, "client", local), m.uncaptured(t, "plain", remote)
	strict, lax := m.pod(t, "strict", local), m.pod(t, "lax", local)
	m.policies = `
- name: istio_converted_static_strict
  namespace: istio-system
  scope: WorkloadSelector
  action: Deny
  dryRun: false
  rules:
  - - - notPrincipals: [!Presence []]`
	strict.more = []string{"authorizationPolicies: [istio-system/istio_converted_static_strict]"}
	m.start(t)
	strict.echoTwice(t)
	lax.echoTwice(t)

	plain.isRefused(t, strict.At(8080))
	plain.request(t, lax.At(8080), hello+hello)
	client.request(t, strict.At(8080), hello+hello)

	out, in := direct(client, strict)
	client.node.says(t, out, in,
		access{
			src: plain, dst: strict, addr: strict.At(8080), inbound: true,
			err: rejected + "explicitly denied by: istio-system/istio_converted_static_strict",
		},
		access{src: plain, dst: lax, addr: lax.At(8080), inbound: true, sent: 22, recv: 11})
}

// A pod without a mesh is reached in plaintext, and reaches.
func TestWithoutMesh(t *testing.T) {
	m := newMesh(t)
	pod, plain := m.pod(t, "pod", local), m.uncaptured(t, "plain", remote)
	m.start(t)
	pod.echoTwice(t)
	plain.echoTwice(t)
	pod.request(t, plain.At(8080), hello+hello)
	plain.request(t, pod.At(8080), hello+hello)
	pod.node.says(t,
		access{src: pod, dst: plain, addr: plain.At(8080), sent: 11, recv: 22},
		access{src: plain, dst: pod, addr: pod.At(8080), inbound: true, sent: 22, recv: 11})
}

// A new policy cuts the connections that it denies, and no others; and without it
// they may come again.
func TestPolicyChange(t *testing.T) {
	m := newMesh(t)
	client, other, server := m.pod(t, "client", local), m.pod(t, "other", local), m.pod(t, "server", remote)
	plain := m.uncaptured(t, "plain", remote)
	m.start(t)
	server.echoTwice(t)
	cut, goesOn, plaintext := client.Dial(t, server.At(8080)), other.Dial(t, server.At(8080)), plain.Dial(t, server.At(8080))
	talks(t, cut)
	talks(t, goesOn)
	talks(t, plaintext)

	// Without an identity one is nobody's principal: plaintext goes on.
	m.policies = deny("no-client", client.identity())
	m.rewrite(t)
	breaks(t, cut)
	talks(t, goesOn)
	talks(t, plaintext)
	out, in := direct(client, server)
	in.err = policyChange
	server.node.says(t, in)
	// What the sender hears is the end of the bytes, and no more.
	client.node.says(t, out)
	client.isRefused(t, server.At(8080))

	m.policies = allow("only-other", other.identity())
	m.rewrite(t)
	breaks(t, plaintext)
	talks(t, goesOn)

	m.policies = ""
	m.rewrite(t)
	client.request(t, server.At(8080), hello+hello)
	plain.request(t, server.At(8080), hello+hello)
	talks(t, goesOn)
	goesOn.Close()

	lateOut, lateIn := out, in
	lateOut.sent, lateOut.recv, lateOut.err = 0, 0, "http status: 401 Unauthorized"
	lateIn.sent, lateIn.recv, lateIn.err = 0, 0, rejected+"explicitly denied by: default/no-client"
	again, againIn := direct(client, server)
	otherOut, otherIn := direct(other, server)
	otherOut.sent, otherOut.recv = 4*11, 4*22
	otherIn.sent, otherIn.recv = 4*22, 4*11
	fromPlain := access{src: plain, dst: server, addr: server.At(8080), inbound: true, sent: 22, recv: 11}
	plainCut := fromPlain
	plainCut.sent, plainCut.recv, plainCut.err = 44, 22, policyChange
	client.node.says(t, out, lateOut, again, otherOut)
	server.node.says(t, in, lateIn, againIn, otherIn, plainCut, fromPlain)
}

// A bad edit of the file is refused, with its line, and what was in force stays so.
func TestBadEdit(t *testing.T) {
	m := newMesh(t)
	client, server := m.pod(t, "client", local), m.pod(t, "server", local)
	m.policies = allow("only-another", "cluster.local/ns/default/sa/another")
	m.start(t)
	server.echoTwice(t)
	good := m.config()
	bad := strings.Replace(good, "action: Allow", "action: Allways", 1)
	line := 1 + strings.Count(bad[:strings.Index(bad, "Allways")], "\n")
	m.write(t, bad)
	zt := client.node.ZT
	zt.Says(t, "the new configuration is refused; the old one stays in force")
	zt.Says(t, fmt.Sprintf("%s: line %d: policies[0].action: ", m.configFile(), line))
	client.isRefused(t, server.At(8080))

	// Half a file, written in place as a bad editor does.
	if err := os.WriteFile(m.configFile(), []byte(good[:len(good)/2]), 0o644); err != nil {
		t.Fatal(err)
	}
	worldtest.WaitFor(t, "second refusal", func() bool { return strings.Count(zt.Log(), "the new configuration is refused") == 2 })
	client.isRefused(t, server.At(8080))

	m.policies = ""
	m.rewrite(t)
	client.request(t, server.At(8080), hello+hello)
}
