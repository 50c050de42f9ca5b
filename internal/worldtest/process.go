package worldtest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/netns"
	"ambient-emulator/internal/testmain"
)

// Command is a command in a network namespace. Its process becomes the program.
func Command(in *netns.NS, program string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), in.FD()), program}, args...)...)
}

// Process is one that has been started, with what it says.
type Process struct {
	*os.Process
	Name  string
	cmd   *exec.Cmd
	log   testmain.Log
	ended chan struct{}
	err   error // once ended
}

// Start starts a program in a network namespace; env is more than our own.
func Start(t *testing.T, in *netns.NS, env []string, program string, args ...string) *Process {
	t.Helper()
	cmd := Command(in, program, args...)
	cmd.Env = append(os.Environ(), env...)
	return StartCommand(t, filepath.Base(program), cmd)
}

// StartCommand starts a command. Its stderr, and its stdout if that leads nowhere
// else, is in the log, which is shown if the test fails.
func StartCommand(t *testing.T, name string, cmd *exec.Cmd) *Process {
	t.Helper()
	p := &Process{Name: name, cmd: cmd, ended: make(chan struct{})}
	cmd.Stderr = &p.log
	if cmd.Stdout == nil {
		cmd.Stdout = &p.log
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.Process = cmd.Process
	go p.wait()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%v said:\n%s", cmd, tail(p.Log()))
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

func (p *Process) wait() {
	p.err = p.cmd.Wait()
	close(p.ended)
}

// Wait waits for the end.
func (p *Process) Wait() error {
	<-p.ended
	return p.err
}

// End signals the process, if it has not ended, and waits. It must end well.
func (p *Process) End(t *testing.T, sig unix.Signal) {
	t.Helper()
	p.Signal(sig)
	select {
	case <-p.ended:
	case <-time.After(20 * time.Second):
		t.Errorf("%s does not end", p.Name)
		p.Signal(unix.SIGQUIT) // says where it hangs
	}
	err := p.Wait()
	exit := new(exec.ExitError)
	killed := sig == unix.SIGKILL && errors.As(err, &exit) && exit.ExitCode() == -1
	if err != nil && !killed {
		t.Errorf("%s ended with %v", p.Name, err)
	}
	for _, bad := range []string{"DATA RACE", "panic", "goroutine "} {
		if strings.Contains(p.Log(), bad) {
			t.Errorf("%s says %q", p.Name, bad)
		}
	}
}

// Descriptors lists those of the process whose target begins with kind.
func (p *Process) Descriptors(t *testing.T, kind string) (fds []int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd/", p.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, err := os.Readlink(dir + e.Name()); err == nil && strings.HasPrefix(target, kind) {
			fd, err := strconv.Atoi(e.Name())
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
		}
	}
	return fds
}

// Log is what the process has said so far.
func (p *Process) Log() string { return p.log.String() }

// Says waits until the process has said text.
func (p *Process) Says(t *testing.T, text string) {
	t.Helper()
	WaitFor(t, fmt.Sprintf("line with %q", text), func() bool {
		ended := false
		select {
		case <-p.ended:
			ended = true
		default:
		}
		said := strings.Contains(p.Log(), text)
		if ended && !said {
			t.Fatalf("%s has ended without a line with %q", p.Name, text)
		}
		return said
	})
}

var (
	timestamp = regexp.MustCompile(`^\S+Z\t`)
	duration  = regexp.MustCompile(`duration="\d+ms"`)
	source    = regexp.MustCompile(`(src\.addr=(\[[^]]+\]|[0-9.]+)):\d+`)
)

// Lines are the access lines so far that have all of parts in them, without what
// differs each time: the time, the duration, the tabs.
func (p *Process) Lines(parts ...string) (lines []string) {
	for line := range strings.Lines(p.Log()) {
		if !strings.HasSuffix(line, "\n") || !strings.Contains(line, "\taccess\t") {
			continue // not all of it yet, or another
		}
		line = strings.TrimSpace(timestamp.ReplaceAllString(line, ""))
		line = strings.ReplaceAll(duration.ReplaceAllString(line, `duration="…"`), "\t", " ")
		if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
			lines = append(lines, line)
		}
	}
	return lines
}

// WaitLines is Lines, when there are any.
func (p *Process) WaitLines(t *testing.T, parts ...string) (lines []string) {
	t.Helper()
	WaitFor(t, fmt.Sprintf("access line with %q", parts), func() bool {
		lines = p.Lines(parts...)
		return len(lines) > 0
	})
	return lines
}

// Line waits for the one access line that has all of parts in it.
func (p *Process) Line(t *testing.T, parts ...string) string {
	t.Helper()
	lines := p.WaitLines(t, parts...)
	if len(lines) > 1 {
		t.Errorf("more than one access line with %q:\n%s", parts, strings.Join(lines, "\n"))
	}
	return lines[0]
}

// AnyPort is an access line without the port of who called.
func AnyPort(line string) string { return source.ReplaceAllString(line, "$1:…") }
