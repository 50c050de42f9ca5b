package cli

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ambient-emulator/cni-emulator/internal/control"
	"ambient-emulator/cni-emulator/internal/redirect"
)

// noArgs checks the words of verbs that take none.
func noArgs(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("what is %q? It takes no arguments", args[0])}
	}
	return nil
}

func newList() *cobra.Command {
	var d daemonFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the running agent's pods, and which ztunnels serve them",
		Example: `  sudo cni-emulator list
  sudo cni-emulator list --json | jq -r '.[] | select(.ztunnels == []) | .name'`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			pods := []control.Pod{}
			err := d.ask(cmd.Context(), control.Request{Verb: control.List}, func(r control.Reply) {
				if r.Pod != nil {
					pods = append(pods, *r.Pod)
				}
			})
			switch {
			case err != nil:
				return fmt.Errorf("list: %w", err)
			case asJSON:
				return printJSON(cmd.OutOrStdout(), pods)
			}
			return printPods(cmd.OutOrStdout(), pods, time.Now())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON: everything, times in full")
	d.register(cmd)
	return cmd
}

func newStatus() *cobra.Command {
	var d daemonFlags
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the running agent and the ztunnels that are connected to it",
		Example: `  sudo cni-emulator status
  sudo cni-emulator status --json | jq '.ztunnels | length'`,
		Args:              noArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			var agent control.Agent
			err := d.ask(cmd.Context(), control.Request{Verb: control.Status}, func(r control.Reply) {
				if r.Agent != nil {
					agent = *r.Agent
				}
			})
			switch {
			case err != nil:
				return fmt.Errorf("status: %w", err)
			case asJSON:
				return printJSON(cmd.OutOrStdout(), agent)
			}
			return printStatus(cmd.OutOrStdout(), agent, time.Now())
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON: everything, times in full")
	d.register(cmd)
	return cmd
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// printPods prints one line a pod.
func printPods(w io.Writer, pods []control.Pod, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAMESPACE\tNAME\tUID\tNETNS\tPATH\tCAPTURE\tZTUNNELS\tERROR")
	for _, p := range pods {
		ns := p.NetNS
		if ns == "" {
			ns = "not at hand"
		}
		var said []string
		for _, z := range p.Ztunnels {
			verdict := "acked"
			if z.Nack != "" {
				verdict = "nacked"
			}
			if z.To == "keep" {
				verdict += " keep"
			}
			said = append(said, fmt.Sprintf("%d %s %s ago", z.PID, verdict, ago(now, z.At)))
		}
		if len(said) == 0 {
			said = []string{"-"}
		}
		trouble := "-"
		if p.LastError != "" {
			trouble = printable(p.LastError)
			if p.LastErrorAt != nil {
				trouble += fmt.Sprintf(" (%s ago)", ago(now, *p.LastErrorAt))
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Namespace, p.Name, p.UID, ns, printable(p.Path), captured(p), strings.Join(said, ", "), trouble)
	}
	return t.Flush()
}

// captured is how the agent has captured a pod, in a word.
func captured(p control.Pod) string {
	mode := redirect.Mode(cmp.Or(p.Capture, string(redirect.None)))
	if mode != redirect.None && p.DNSCapture == "true" {
		return string(mode) + "+dns"
	}
	return string(mode)
}

// printStatus prints the agent, and one line a ztunnel.
func printStatus(w io.Writer, a control.Agent, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "agent:\tpid %d in %s, for %s\n", a.PID, a.NetNS, ago(now, a.Since))
	fmt.Fprintf(t, "ztunnels at:\t%s\n", printable(a.ZDS))
	fmt.Fprintf(t, "verbs at:\t%s\n", printable(a.Control))
	if a.State != "" {
		fmt.Fprintf(t, "state in:\t%s\n", printable(a.State))
	}
	if a.Watch != "" {
		fmt.Fprintf(t, "watches:\t%s\n", printable(a.Watch))
	}
	fmt.Fprintf(t, "pods:\t%d\n", a.Pods)
	fmt.Fprintf(t, "ztunnels:\t%d\n", len(a.Ztunnels))
	if err := t.Flush(); err != nil || len(a.Ztunnels) == 0 {
		return err
	}
	fmt.Fprintln(w)
	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "PID\tUID\tSINCE\tSTATE\tACKED\tNACKED\tQUEUED\tNEW PODS")
	for _, z := range a.Ztunnels {
		gets := "no"
		if z.Newest {
			gets = "yes"
		}
		fmt.Fprintf(t, "%d\t%d\t%s ago\t%s\t%d\t%d\t%d\t%s\n", z.PID, z.UID, ago(now, z.Since), z.State, z.Acked, z.Nacked, z.Queued, gets)
	}
	return t.Flush()
}

// ago is a time as a person says it.
func ago(now, then time.Time) string {
	d := now.Sub(then)
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}
