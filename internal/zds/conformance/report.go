package conformance

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
)

// Passed tells whether nothing was broken and something was kept. Strictly, all
// of it has to be kept.
func (r *Report) Passed(strict bool) bool {
	kept := r.Count(Kept)
	if strict {
		return kept == len(r.Results)
	}
	return kept > 0 && r.Count(Broken) == 0
}

// Table writes the report for a person.
func (r *Report) Table(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, res := range r.Results {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", res.ID, res.Status, res.Says)
		if res.Why != "" {
			fmt.Fprintf(tw, "\t\t%s %s (%s)\n", arrow(res.Status), res.Why, res.Source)
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "%s: of %d promises %d kept, %d broken, %d where it differs from the emulators' improvements, %d not tried\n",
		r.Target, len(r.Results), r.Count(Kept), r.Count(Broken), r.Count(Differs), r.Count(NotTried))
	return err
}

func arrow(s Status) string {
	if s == Broken {
		return "!!"
	}
	return "->"
}

// JSON writes it for a program.
func (r *Report) JSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
