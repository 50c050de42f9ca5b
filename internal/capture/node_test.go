package capture

import (
	"errors"
	"fmt"
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
	"ambient-emulator/internal/netns/netnstest"
)

// node is a node agent and a ztunnel, in a network namespace of their own. Where
// that is does not matter: a pod is where its descriptor says.
type node struct {
	home    *netns.NS
	dir     string
	env     []string // of ztunnel
	args    []string // of ztunnel
	program string   // ztunnel
	agent   *process
	zt      *process
}

// settings of a ztunnel that are not the usual ones.
type setting func(*node)

func withEnv(env ...string) setting   { return func(n *node) { n.env = append(n.env, env...) } }
func withArgs(args ...string) setting { return func(n *node) { n.args = append(n.args, args...) } }

// fast is a ztunnel without the race detector, which knows 8,128 goroutines.
func fast(n *node) { n.program = filepath.Join(bin, "fast", "ztunnel-emulator") }

// newNode starts an agent and a ztunnel. They end, well, with the test.
func newNode(t *testing.T, settings ...setting) *node {
	t.Helper()
	if err := built(); err != nil {
		t.Fatal(err)
	}
	n := &node{home: netnstest.New(t), dir: t.TempDir(), program: filepath.Join(bin, "ztunnel-emulator")}
	n.env = []string{"CONNECTION_TERMINATION_DEADLINE=50ms"}
	for _, set := range settings {
		set(n)
	}
	n.agent = start(t, n.home, nil, filepath.Join(bin, "cni-emulator"), "serve", "--zds-uds", n.zds(), "--control-uds", n.control())
	t.Cleanup(func() { n.agent.end(t, unix.SIGTERM) })
	waitFor(t, "agent", func() bool { return exists(n.control()) && exists(n.zds()) })
	n.startZtunnel(t)
	t.Cleanup(func() { n.zt.end(t, unix.SIGTERM) })
	return n
}

func (n *node) zds() string     { return filepath.Join(n.dir, "zds.sock") }
func (n *node) control() string { return filepath.Join(n.dir, "control.sock") }

// startZtunnel starts the node's ztunnel, again.
func (n *node) startZtunnel(t *testing.T) {
	t.Helper()
	args := append([]string{"--inpod-uds", n.zds()}, n.args...)
	n.zt = start(t, n.home, n.env, n.program, args...)
}

// add makes the place a pod of the node, captured as the words say.
func (n *node) add(t *testing.T, p *place, words ...string) {
	t.Helper()
	if out, err := n.tryAdd(p, words...); err != nil {
		t.Fatalf("add %s: %v: %s", p.name, err, out)
	}
}

func (n *node) tryAdd(p *place, words ...string) (string, error) {
	args := append([]string{"add", p.name, "--netns", p.path(), "--control-uds", n.control()}, words...)
	out, err := exec.Command(filepath.Join(bin, "cni-emulator"), args...).CombinedOutput()
	return string(out), err
}

// del ends the pod.
func (n *node) del(t *testing.T, p *place) {
	t.Helper()
	if out, err := exec.Command(filepath.Join(bin, "cni-emulator"), "del", p.name, "--control-uds", n.control()).CombinedOutput(); err != nil {
		t.Fatalf("del %s: %v: %s", p.name, err, out)
	}
}

// process is one of the programs, with what it says.
type process struct {
	name  string
	cmd   *exec.Cmd
	out   output
	ended chan struct{}
	err   error // once ended
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

// start starts a program in a namespace.
func start(t *testing.T, in *netns.NS, env []string, program string, args ...string) *process {
	t.Helper()
	p := &process{name: filepath.Base(program), ended: make(chan struct{})}
	p.cmd = exec.Command("nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), in.FD()), program}, args...)...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go p.wait()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s %s said:\n%s", p.name, strings.Join(args, " "), &p.out)
		}
	})
	return p
}

func (p *process) wait() {
	p.err = p.cmd.Wait()
	close(p.ended)
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// end signals the process, if it has not ended, and waits. It must end well.
func (p *process) end(t *testing.T, sig unix.Signal) {
	t.Helper()
	p.cmd.Process.Signal(sig)
	select {
	case <-p.ended:
	case <-time.After(20 * time.Second):
		t.Errorf("%s does not end", p.name)
		p.cmd.Process.Signal(unix.SIGQUIT) // says where it hangs
		<-p.ended
	}
	exit := new(exec.ExitError)
	killed := sig == unix.SIGKILL && errors.As(p.err, &exit) && exit.ExitCode() == -1
	if p.err != nil && !killed {
		t.Errorf("%s ended with %v", p.name, p.err)
	}
	if strings.Contains(p.out.String(), "DATA RACE") {
		t.Errorf("%s has a data race", p.name)
	}
}

var (
	timestamp = regexp.MustCompile(`^\S+Z\t`)
	duration  = regexp.MustCompile(`duration="\d+ms"`)
)

// lines are the access lines so far that have all of parts in them, without what
// differs each time: the time, the duration.
func (p *process) lines(parts ...string) (lines []string) {
	for line := range strings.Lines(p.out.String()) {
		if !strings.HasSuffix(line, "\n") {
			continue // not all of it yet
		}
		line = strings.TrimSpace(timestamp.ReplaceAllString(line, ""))
		line = strings.ReplaceAll(duration.ReplaceAllString(line, `duration="…"`), "\t", " ")
		if strings.Contains(line, " access ") && containsAll(line, parts) {
			lines = append(lines, line)
		}
	}
	return lines
}

func containsAll(s string, parts []string) bool {
	for _, part := range parts {
		if !strings.Contains(s, part) {
			return false
		}
	}
	return true
}

// line waits for the one access line that has all of parts in it.
func (p *process) line(t *testing.T, parts ...string) string {
	t.Helper()
	var lines []string
	waitFor(t, fmt.Sprintf("access line with %q", parts), func() bool {
		lines = p.lines(parts...)
		return len(lines) > 0
	})
	if len(lines) > 1 {
		t.Errorf("more than one access line with %q:\n%s", parts, strings.Join(lines, "\n"))
	}
	return lines[0]
}

// says waits for any line of the process that has text in it.
func (p *process) says(t *testing.T, text string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("line with %q", text), func() bool { return strings.Contains(p.out.String(), text) })
}
