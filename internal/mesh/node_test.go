package mesh

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
)

// node is a node agent and a ztunnel, in the pod of the latter.
type node struct {
	mesh    *mesh
	number  int
	home    *pod
	env     []string // of ztunnel
	program string   // ztunnel
	agent   *process
	zt      *process
}

// fast is for a ztunnel without the race detector, which knows 8,128 goroutines,
// and is slow.
func (n *node) fast() { n.program = filepath.Join(bin, "fast", "ztunnel-emulator") }

func (n *node) zds() string { return filepath.Join(n.mesh.dir, fmt.Sprint("zds", n.number, ".sock")) }

func (n *node) control() string {
	return filepath.Join(n.mesh.dir, fmt.Sprint("control", n.number, ".sock"))
}

// startZtunnel starts the node's ztunnel, again.
func (n *node) startZtunnel(t *testing.T) {
	t.Helper()
	ca := testCA()
	env := append([]string{"NODE_NAME=" + nodeNames[n.number]}, n.env...)
	n.zt = start(t, n.home.NS, env, n.program, "--inpod-uds", n.zds(), "--local-xds", n.mesh.configFile(), "--ca-cert", ca.certFile, "--ca-key", ca.keyFile)
	n.zt.says(t, "\tready\t")
}

// add has the node's agent make the pod one of its own.
func (n *node) add(t *testing.T, p *pod) {
	t.Helper()
	n.verb(t, "add", p.name, "--netns", p.path, "--service-account", p.account, "--uid", p.uid())
}

// del ends the pod.
func (n *node) del(t *testing.T, p *pod) {
	t.Helper()
	n.verb(t, "del", p.name, "--uid", p.uid())
}

func (n *node) verb(t *testing.T, args ...string) {
	t.Helper()
	cni(t, append(args, "--control-uds", n.control())...)
}

// cni runs cni-emulator, which must go well.
func cni(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(filepath.Join(bin, "cni-emulator"), args...).CombinedOutput(); err != nil {
		t.Fatalf("cni-emulator %s: %v: %s", strings.Join(args, " "), err, out)
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
			t.Logf("%s %s said:\n%s", p.name, strings.Join(args, " "), tail(p.out.String()))
		}
	})
	return p
}

// tail is the end of what is too long to be read.
func tail(s string) string {
	const most = 16 << 10
	if len(s) > most {
		return "…" + s[len(s)-most:]
	}
	return s
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

// says waits for any line of the process that has text in it.
func (p *process) says(t *testing.T, text string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("line with %q", text), func() bool {
		select {
		case <-p.ended:
			if !strings.Contains(p.out.String(), text) {
				t.Fatalf("%s has ended without a line with %q", p.name, text)
			}
			return true
		default:
			return strings.Contains(p.out.String(), text)
		}
	})
}
