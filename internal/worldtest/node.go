package worldtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// Node is a node agent and a ztunnel. A pod is where its descriptor says, so their
// own network namespace may be any.
type Node struct {
	Home      *netns.NS
	Env, Args []string // of ztunnel
	Program   string   // ztunnel's
	Agent, ZT *Process

	dir string // of the sockets
}

// NewNode is a node to be started, whose ztunnel lets no connection wait for long
// when it ends.
func NewNode(t *testing.T, home *netns.NS) *Node {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "node") // a test's own folder may be too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	return &Node{Home: home, Env: []string{"CONNECTION_TERMINATION_DEADLINE=50ms"}, Program: Ztunnel, dir: dir}
}

// Start starts the agent, with more words for it, and the ztunnel. They end, well,
// with the test.
func (n *Node) Start(t *testing.T, words ...string) {
	t.Helper()
	n.Agent = Start(t, n.Home, nil, Agent, slices.Concat([]string{"serve", "--zds-uds", n.zds(), "--control-uds", n.control()}, words)...)
	t.Cleanup(func() { n.Agent.End(t, unix.SIGTERM) })
	WaitFor(t, "agent", func() bool { return Exists(n.control()) && Exists(n.zds()) })
	n.StartZtunnel(t)
	t.Cleanup(func() { n.ZT.End(t, unix.SIGTERM) })
}

// StartZtunnel starts the node's ztunnel, again.
func (n *Node) StartZtunnel(t *testing.T) {
	t.Helper()
	n.ZT = Start(t, n.Home, n.Env, n.Program, append([]string{"--inpod-uds", n.zds()}, n.Args...)...)
	n.ZT.Says(t, "\tready\t")
}

func (n *Node) zds() string     { return filepath.Join(n.dir, "zds.sock") }
func (n *Node) control() string { return filepath.Join(n.dir, "control.sock") }

// Add makes the place a pod of the node; words are more of the verb's.
func (n *Node) Add(t *testing.T, p *Place, words ...string) {
	t.Helper()
	if err := n.TryAdd(p, words...); err != nil {
		t.Fatal(err)
	}
}

// TryAdd is Add, which need not go well.
func (n *Node) TryAdd(p *Place, words ...string) error {
	_, err := TryCNI(slices.Concat([]string{"add", p.Name, "--netns", p.Path, "--control-uds", n.control()}, words)...)
	return err
}

// Del ends the pod; words are more of the verb's.
func (n *Node) Del(t *testing.T, p *Place, words ...string) {
	t.Helper()
	CNI(t, slices.Concat([]string{"del", p.Name, "--control-uds", n.control()}, words)...)
}

// CNI runs cni-emulator, which must go well, and returns what it has said.
func CNI(t *testing.T, args ...string) string {
	t.Helper()
	out, err := TryCNI(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TryCNI is CNI, which need not go well. What it has said is in the error, too.
func TryCNI(args ...string) (string, error) {
	out, err := exec.Command(Agent, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("cni-emulator %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}
