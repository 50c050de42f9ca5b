// Package interop tests the tunnel against peers that are not of this project:
// Debian's h2 for Python over Python's own TLS, as client and as server, and
// openssl. They speak to the whole program, which serves pods of a world that
// scripts/world builds.
//
// What the peers do, and what they want of us, is in testdata: a script each for
// peers that keep the rules (client.py, server.py) and for those that don't
// (hostile.py). The tests here are the applications, and look at what is said in
// the log and what it has cost.
package interop

import (
	"io"
	"testing"

	"ambient-emulator/internal/worldtest"
)

func TestMain(m *testing.M) { worldtest.Main(m, 4) }

// world has enough pods for all tests here: none is used twice.
var world = worldtest.Shared(24)

// newPod takes a pod of a node, 2 or 3, that nobody else has. Its name is its service
// account's, too.
func newPod(t *testing.T, node int, name string) *worldtest.Place {
	t.Helper()
	p := world(t).Pod(t, node)
	p.Name = name
	return p
}

// echo says everything back, and then ends too.
func echo(c *worldtest.Conn) {
	io.Copy(struct{ io.Writer }{c}, c) // not by splice(2), whose pipes stay until they are collected
	c.CloseWrite()
}
