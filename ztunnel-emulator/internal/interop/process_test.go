package interop

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// process is one of the programs, or a peer.
type process struct {
	name  string
	cmd   *exec.Cmd
	log   output         // what it says on stderr
	lines *bufio.Scanner // what it says on stdout, if it is a peer
	in    io.WriteCloser // what a peer is told
	once  sync.Once
	err   error // how it ended
	ended chan struct{}
}

// output is what a process has said so far.
type output struct {
	mu   sync.Mutex
	text strings.Builder
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func command(in *netns.NS, program string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), in.FD()), program}, args...)...)
}

// start starts a program in a namespace.
func start(t *testing.T, in *netns.NS, env []string, program string, args ...string) *process {
	t.Helper()
	p := &process{name: filepath.Base(program), cmd: command(in, program, args...), ended: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	must(t, p.cmd.Start())
	p.keep(t)
	go p.wait()
	return p
}

// peer starts a script of testdata in a pod. It must end well before the test does;
// if the test fails first, it is killed.
func (p *pod) peer(t *testing.T, script, what string, about map[string]any) *process {
	t.Helper()
	text, err := json.Marshal(about)
	must(t, err)
	// Not the Python that a person may prefer: h2 is Debian's. -B leaves no
	// compiled files in the tree.
	c := &process{name: script + " " + what, cmd: command(p.NS, "/usr/bin/python3", "-B", filepath.Join("testdata", script), what, string(text)), ended: make(chan struct{})}
	c.cmd.Stderr = &c.log
	out, err := c.cmd.StdoutPipe()
	must(t, err)
	c.lines = bufio.NewScanner(out)
	c.in, err = c.cmd.StdinPipe()
	must(t, err)
	must(t, c.cmd.Start())
	c.keep(t)
	t.Cleanup(func() {
		c.cmd.Process.Kill()
		c.reap()
	})
	return c
}

// keep shows what the process has said if the test fails.
func (p *process) keep(t *testing.T) {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s said:\n%s", p.name, tail(p.log.String()))
		}
	})
}

// tail is the end of what is too long to be read.
func tail(s string) string {
	const most = 8 << 10
	if len(s) > most {
		return "…" + s[len(s)-most:]
	}
	return s
}

func (p *process) wait() {
	p.err = p.cmd.Wait()
	close(p.ended)
}

// reap waits for a peer.
func (p *process) reap() error {
	p.once.Do(p.wait)
	return p.err
}

// next is the next thing that the peer tells us.
func (p *process) next(t *testing.T, into any) {
	t.Helper()
	if !p.lines.Scan() {
		t.Fatalf("%s has nothing more to say: %v", p.name, p.reap())
	}
	if err := json.Unmarshal(p.lines.Bytes(), into); err != nil {
		t.Fatalf("%s says %q: %v", p.name, p.lines.Text(), err)
	}
}

// expect waits for one thing that the peer tells us.
func (p *process) expect(t *testing.T, want string) {
	t.Helper()
	var got string
	if p.next(t, &got); got != want {
		t.Fatalf("%s says %q, want %q", p.name, got, want)
	}
}

// tell tells the peer something, a line.
func (p *process) tell(t *testing.T, text string) {
	t.Helper()
	if _, err := io.WriteString(p.in, text+"\n"); err != nil {
		t.Fatalf("tell %s: %v", p.name, err)
	}
}

// isContent waits for the end of a peer, who must have nothing to complain about.
func (p *process) isContent(t *testing.T) {
	t.Helper()
	p.in.Close()
	for p.lines.Scan() { // to the end, or the pipe is closed too early
	}
	if err := p.reap(); err != nil {
		t.Errorf("%s: %v", p.name, err)
	}
}

// end tells one of the programs to end, if it has not, and waits.
func (p *process) end(t *testing.T) {
	t.Helper()
	p.cmd.Process.Signal(unix.SIGTERM)
	p.endsWell(t)
}

// endsWell waits for the end of one of the programs.
func (p *process) endsWell(t *testing.T) {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(20 * time.Second):
		t.Errorf("%s does not end", p.name)
		p.cmd.Process.Signal(unix.SIGQUIT) // says where it hangs
		<-p.ended
	}
	if p.err != nil {
		t.Errorf("%s ended with %v", p.name, p.err)
	}
	for _, bad := range []string{"DATA RACE", "panic", "goroutine "} {
		if strings.Contains(p.log.String(), bad) {
			t.Errorf("%s says %q", p.name, bad)
		}
	}
}

// says waits for any line of the process that has text in it.
func (p *process) says(t *testing.T, text string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("line with %q", text), func() bool { return strings.Contains(p.log.String(), text) })
}

var (
	timestamp = regexp.MustCompile(`^\S+Z\t`)
	duration  = regexp.MustCompile(`duration="\d+ms"`)
)

// line waits for an access line that has all of parts in it, and returns the last,
// without what differs each time: the time, the duration.
func (p *process) line(t *testing.T, parts ...string) (found string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("access line with %q", parts), func() bool {
		for line := range strings.Lines(p.log.String()) {
			if !strings.HasSuffix(line, "\n") {
				break // not all of it yet
			}
			line = duration.ReplaceAllString(timestamp.ReplaceAllString(strings.TrimSpace(line), ""), `duration="…"`)
			line = strings.ReplaceAll(line, "\t", " ")
			if strings.Contains(line, " access ") && containsAll(line, parts) {
				found = line
			}
		}
		return found != ""
	})
	return found
}

func containsAll(s string, parts []string) bool {
	for _, part := range parts {
		if !strings.Contains(s, part) {
			return false
		}
	}
	return true
}
