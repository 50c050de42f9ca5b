package interop

import (
	"bufio"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	"ambient-emulator/internal/worldtest"
)

// peer is a script of testdata that runs.
type peer struct {
	*worldtest.Process
	lines *bufio.Scanner // what it says
	in    io.WriteCloser // what it is told
}

// startPeer starts a script in a pod. It must end well before the test does; if the
// test fails first, it is killed.
func startPeer(t *testing.T, in *worldtest.Place, script, what string, about map[string]any) *peer {
	t.Helper()
	text, err := json.Marshal(about)
	must(t, err)
	// Not the Python that a person may prefer: h2 is Debian's. -B leaves no
	// compiled files in the tree.
	cmd := worldtest.Command(in.NS, "/usr/bin/python3", "-B", filepath.Join("testdata", script), what, string(text))
	out, stdout, err := os.Pipe() // which no Wait closes before all has been read
	must(t, err)
	t.Cleanup(func() { out.Close() })
	cmd.Stdout = stdout
	stdin, err := cmd.StdinPipe()
	must(t, err)
	p := &peer{worldtest.StartCommand(t, script+" "+what, cmd), bufio.NewScanner(out), stdin}
	stdout.Close()
	t.Cleanup(func() {
		p.Kill()
		p.Wait()
	})
	return p
}

// next is the next thing that the peer tells us.
func (p *peer) next(t *testing.T, into any) {
	t.Helper()
	if !p.lines.Scan() {
		t.Fatalf("%s has nothing more to say: %v", p.Name, p.Wait())
	}
	if err := json.Unmarshal(p.lines.Bytes(), into); err != nil {
		t.Fatalf("%s says %q: %v", p.Name, p.lines.Text(), err)
	}
}

// expect waits for one thing that the peer tells us.
func (p *peer) expect(t *testing.T, want string) {
	t.Helper()
	var got string
	if p.next(t, &got); got != want {
		t.Fatalf("%s says %q, want %q", p.Name, got, want)
	}
}

// tell tells the peer something, a line.
func (p *peer) tell(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(p.in, text+"\n"); err != nil {
		t.Fatalf("tell %s: %v", p.Name, err)
	}
}

// isContent waits for the end of a peer, who must have nothing to complain about.
func (p *peer) isContent(t *testing.T) {
	t.Helper()
	p.in.Close()
	for p.lines.Scan() { // to the end, or the pipe is closed too early
	}
	if err := p.Wait(); err != nil {
		t.Errorf("%s: %v", p.Name, err)
	}
}
