// Command conformance holds a ztunnel or an istio-cni agent, of any make, to
// the promises of ZDS. scripts/conformance builds and runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"ambient-emulator/internal/zds/conformance"
)

// No teleport may use the main thread (golang/go#34031).
func init() { runtime.LockOSThread() }

const usage = `usage: conformance [FLAG ...] client:PATH [-- COMMAND ARG ...]
       conformance [FLAG ...] server:PATH [-- COMMAND ARG ...]
       conformance list

client:PATH  the half under test is a ztunnel that dials PATH; we listen there
server:PATH  the half under test is an agent that listens at PATH; we dial
COMMAND      starts the half under test, and a client again after it has exited
list         lists the promises

`

// errUsage says that the words of the call were wrong, and has been explained.
var errUsage = errors.New("usage")

type call struct {
	conformance.Options
	half string
	json bool
}

func main() {
	// Not here: this goroutine is locked to the main thread.
	done := make(chan int, 1)
	go func() { done <- run() }()
	os.Exit(<-done)
}

func run() int {
	c, err := parse(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return 2
	case c.half == "list":
		list()
		return 0
	}

	// Whatever we have started or made ends with us.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	try := conformance.Client
	if c.half == "server" {
		try = conformance.Server
	}
	report, err := try(ctx, c.Options)
	if report != nil && len(report.Results) > 0 {
		write := report.Table
		if c.json {
			write = report.JSON
		}
		err = errors.Join(err, write(os.Stdout))
	}
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", strings.ReplaceAll(err.Error(), "\n", "; "))
		return 1
	}
	if !report.Passed(c.Strict) {
		return 1
	}
	return 0
}

func parse(args []string) (c call, err error) {
	fs := flag.NewFlagSet("conformance", flag.ContinueOnError)
	fs.Usage = func() {
		fmt.Fprint(fs.Output(), usage)
		fs.PrintDefaults()
	}
	var only string
	var quiet, verbose bool
	fs.StringVar(&c.Add, "add", "", "shell `command` that tells the agent of a pod, with the words {uid} {name} {namespace} {service-account} {netns}")
	fs.StringVar(&c.Del, "del", "", "shell `command` that tells the agent of a pod's end, with the same words")
	fs.BoolVar(&c.json, "json", false, "report as JSON")
	fs.StringVar(&only, "only", "", "try only promises of these `ids`, as patterns with commas between them")
	fs.BoolVar(&quiet, "quiet", false, "no progress on stderr")
	fs.BoolVar(&c.Restarts, "restarts", false, "somebody starts the client again when it exits")
	fs.BoolVar(&c.Strict, "strict", false, "exit 0 only if everything is kept: the emulators' improvements too, and nothing is not tried")
	fs.BoolVar(&verbose, "v", false, "show what COMMAND and the hooks print, on stderr")
	fs.DurationVar(&c.Wait, "wait", 30*time.Second, "how long to wait for the half under test to appear")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return c, err
		}
		return c, errUsage
	}
	wrong := func(format string, a ...any) (call, error) {
		fmt.Fprintf(os.Stderr, "conformance: "+format+"\nSee `conformance -h`.\n", a...)
		return c, errUsage
	}
	rest := fs.Args()
	if len(rest) == 0 {
		return wrong("what is to be tested? client:PATH or server:PATH")
	}
	var ok bool
	c.half, c.Path, ok = strings.Cut(rest[0], ":")
	if c.half == "list" && !ok && len(rest) == 1 {
		return c, nil
	}
	if c.half != "client" && c.half != "server" || c.Path == "" {
		return wrong("client:PATH or server:PATH was expected, not %q", rest[0])
	}
	if len(rest) > 1 {
		if rest[1] != "--" || len(rest) == 2 {
			return wrong("flags come first, and a command after --; what is %q?", rest[1])
		}
		c.Command = rest[2:]
	}
	if (c.Add == "") != (c.Del == "") {
		return wrong("--add and --del go together")
	}
	if only != "" {
		c.Only = strings.Split(only, ",")
	}
	if !quiet {
		c.Progress = os.Stderr
	}
	if verbose {
		c.Output = os.Stderr
	}
	return c, nil
}

func list() {
	for _, half := range []struct {
		name string
		ps   []conformance.Promise
	}{{"client", conformance.ClientPromises()}, {"server", conformance.ServerPromises()}} {
		for _, p := range half.ps {
			more := ""
			if p.Improvement {
				more = ", an improvement on the real half"
			}
			fmt.Printf("%s %s: %s (%s%s)\n", half.name, p.ID, p.Says, p.Source, more)
		}
	}
}
