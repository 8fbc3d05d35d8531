package page

import (
	"fmt"
	"strings"

	"virt-trust/internal/appraise"
)

// drawing is a chain laid out: numbers and texts, which the template draws as SVG.
type drawing struct {
	ID            string // of its parts, unique on the page
	Class         string
	Width, Height int
	Title, Desc   string
	Groups        []drawnGroup
	Edges         []drawnEdge
	Boxes         []drawnBox
	Verdict       drawnBox
}

type drawnGroup struct {
	X, Y, W, H int
	Label      string
}

type drawnEdge struct {
	D, Tip string // path, and the points of the arrow's head; none where ""
	Tier   appraise.Tier
}

type drawnBox struct {
	X, Y, W, H                int
	Link                      string // what it leads to
	Title, Detail, Word, Says string
	Tier                      appraise.Tier
}

// Sizes in units of the picture, which are CSS pixels at full width.
const (
	boxH    = 60
	boxGap  = 24
	pad     = 12
	headH   = 36
	columnW = 328
	gutter  = 68
)

// Wide is the picture in three columns, for screens.
func (c *chain) Wide() drawing {
	d := c.drawing("wide", 3*columnW+2*gutter, headH+5*boxH+4*boxGap+pad)
	row := func(i int) int { return headH + i*(boxH+boxGap) }
	x := [3]int{0, columnW + gutter, 2 * (columnW + gutter)}
	d.group(x[0], 0, columnW, row(5)-boxGap+pad, "Host "+c.Host)
	d.group(x[1], 0, columnW, row(3)-boxGap+pad, "Started for the VM")
	d.group(x[2], 0, columnW, row(4)-boxGap+pad, "VM "+c.VM)
	for i, l := range c.Links {
		col, r := 0, i
		switch {
		case i >= linkVTPM:
			col, r = 2, i-linkVTPM
		case i >= linkSwtpm:
			col, r = 1, i-linkSwtpm
		}
		d.box(x[col]+pad, row(r), columnW-2*pad, l)
		if r > 0 && col != 1 {
			d.arrow(x[col]+columnW/2, row(r)-boxGap, x[col]+columnW/2, row(r), c.rest(i-1))
		}
	}
	// From virt-trustd to what it measured and let start, over a bus in the gutter.
	from, bus := row(4)+boxH/2, x[1]-gutter/2
	tier := c.rest(linkDaemon)
	d.Edges = append(d.Edges, drawnEdge{D: fmt.Sprintf("M%d %dH%dV%d", x[0]+columnW-pad, from, bus, row(0)+boxH/2), Tier: tier})
	for r := range 3 {
		d.arrow(bus, row(r)+boxH/2, x[1]+pad, row(r)+boxH/2, tier)
	}
	// swtpm plays the vTPM, the image is the guest's firmware, QEMU runs it all.
	d.arrow(x[1]+columnW-pad, row(0)+boxH/2, x[2]+pad, row(0)+boxH/2, c.rest(linkSwtpm))
	d.arrow(x[1]+columnW-pad, row(1)+boxH/2, x[2]+pad, row(1)+boxH/2, c.rest(linkImage))
	d.arrow(x[1]+columnW-pad, row(2)+boxH/2, x[2], row(2)+boxH/2, c.rest(linkQEMU))
	d.verdict(c, x[2], row(4)+pad, columnW, boxH-pad)
	d.arrow(x[2]+columnW/2, row(4)-boxGap+pad, x[2]+columnW/2, row(4)+pad, c.Tier)
	return d
}

// Narrow is the same picture in one column, for phones and print.
func (c *chain) Narrow() drawing {
	d := c.drawing("narrow", columnW+2*pad, 0)
	y := 0
	heads := map[int]string{linkTPM: "Host " + c.Host, linkSwtpm: "Started for the VM", linkVTPM: "VM " + c.VM}
	ends := map[int]int{linkTPM: linkSwtpm, linkSwtpm: linkVTPM, linkVTPM: numLinks}
	d.Width -= 4 // as group and boxes count
	middle := d.Width / 2
	for i, l := range c.Links {
		gap := boxGap
		if i > linkSwtpm && i <= linkQEMU {
			gap = pad // side by side in truth: no arrow between them
		}
		if head, ok := heads[i]; ok {
			if i > 0 {
				d.arrow(middle, y+pad, middle, y+pad+boxGap+pad, c.rest(i-1))
				y += boxGap + 2*pad
			}
			n := ends[i] - i
			h := headH + n*boxH + (n-1)*boxGap + pad
			if i == linkSwtpm {
				h = headH + n*boxH + (n-1)*pad + pad
			}
			d.group(0, y, d.Width, h, head)
			y += headH
		} else {
			if gap == boxGap {
				d.arrow(middle, y, middle, y+gap, c.rest(i-1))
			}
			y += gap
		}
		d.box(pad, y, columnW, l)
		y += boxH
	}
	d.arrow(middle, y+pad, middle, y+pad+boxGap, c.Tier)
	y += pad + boxGap
	d.verdict(c, 0, y, d.Width, boxH-pad)
	d.Width, d.Height = d.Width+4, y+boxH-pad+4
	return d
}

func (c *chain) drawing(class string, w, h int) drawing {
	var says []string
	for _, l := range c.Links {
		says = append(says, l.Title+": "+l.Word)
	}
	return drawing{
		ID: "chain-" + class, Class: class, Width: w + 4, Height: h + 4,
		Title: "Chain of trust from the host's TPM to the guest's kernel",
		Desc:  c.Summary() + " In order: " + strings.Join(says, "; ") + ".",
	}
}

// rest is the colour of the line out of a link: that of the link, or worse where
// the link itself rests on something broken.
func (c *chain) rest(i int) appraise.Tier { return c.Links[i].Tier }

func (d *drawing) group(x, y, w, h int, label string) {
	d.Groups = append(d.Groups, drawnGroup{x, y, w, h, cut(label, (w-2*pad)/8)})
}

// box draws a link. Texts are cut to what fits: 7.2 units a character, in the
// broadest of the faces that browsers have.
func (d *drawing) box(x, y, w int, l link) {
	says := l.Title + ": " + l.Word
	if l.Detail != "" {
		says += ". " + cut(l.Detail, 200)
	}
	d.Boxes = append(d.Boxes, drawnBox{
		X: x, Y: y, W: w, H: boxH, Link: "link-" + l.ID, Title: l.Title, Detail: cut(l.Detail, (w-56)*10/72-len(l.Word)-3), Word: l.Word, Says: says, Tier: l.Tier,
	})
}

func (d *drawing) verdict(c *chain, x, y, w, h int) {
	d.Verdict = drawnBox{X: x, Y: y, W: w, H: h, Title: "This VM", Word: tierWord(c.Tier), Tier: c.Tier}
}

// arrow draws a line with a head at its end, down or to the right.
func (d *drawing) arrow(x1, y1, x2, y2 int, t appraise.Tier) {
	e := drawnEdge{Tier: t}
	if x1 == x2 {
		e.D = fmt.Sprintf("M%d %dV%d", x1, y1, y2-7)
		e.Tip = fmt.Sprintf("%d,%d %d,%d %d,%d", x2, y2, x2-6, y2-9, x2+6, y2-9)
	} else {
		e.D = fmt.Sprintf("M%d %dH%d", x1, y1, x2-7)
		e.Tip = fmt.Sprintf("%d,%d %d,%d %d,%d", x2, y2, x2-9, y2-6, x2-9, y2+6)
	}
	d.Edges = append(d.Edges, e)
}

// At gives a place in the box.
func (b drawnBox) At(dx, dy int) string { return fmt.Sprintf("translate(%d %d)", b.X+dx, b.Y+dy) }

// TextX and the like are where texts stand.
func (b drawnBox) TextX() int   { return b.X + 44 }
func (b drawnBox) TitleY() int  { return b.Y + 25 }
func (b drawnBox) DetailY() int { return b.Y + 45 }

// LabelX and LabelY are where the verdict's text stands.
func (b drawnBox) LabelX() int { return b.X + 46 }
func (b drawnBox) LabelY() int { return b.Y + 29 }

// LabelX and LabelY are where a group's label stands.
func (g drawnGroup) LabelX() int { return g.X + pad }
func (g drawnGroup) LabelY() int { return g.Y + 23 }
